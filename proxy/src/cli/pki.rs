//! `skyferry pki`: makes the files and says what comes next.

use std::process::ExitCode;

use super::{PkiCommand, fail};
use crate::pki;

pub(super) fn run(command: &PkiCommand) -> ExitCode {
    match command {
        PkiCommand::Init { dir, name, days } => match pki::init(dir, name.as_deref(), *days) {
            Ok(files) => {
                println!("CA certificate: {}", files.cert.display());
                println!(
                    "CA key:         {} (keep it secret, keep it safe)",
                    files.key.display()
                );
                println!("Next, for each gateway:");
                println!("  skyferry pki issue --dir {} --name edge-a", dir.display());
                ExitCode::SUCCESS
            }
            Err(error) => fail(error),
        },
        PkiCommand::Issue {
            dir,
            name,
            days,
            san,
        } => match pki::issue(dir, name, san, *days) {
            Ok(files) => {
                println!("certificate: {}", files.cert.display());
                println!("key:         {}", files.key.display());
                if files.cut_to_ca {
                    println!("It expires with the CA, sooner than asked for.");
                }
                let name = name.to_ascii_lowercase();
                println!(
                    "Next: copy these two and ca.pem to the gateway, never ca.key, and set there:"
                );
                println!("  [gateway]");
                println!("  name = \"{name}\"");
                println!("  [tls]");
                println!("  ca = \"ca.pem\"");
                println!("  cert = \"{name}.pem\"");
                println!("  key = \"{name}.key\"");
                ExitCode::SUCCESS
            }
            Err(error) => fail(error),
        },
    }
}

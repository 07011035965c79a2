//! `skyferry pki`: makes the files and says what comes next.

use std::process::ExitCode;

use super::{PkiCommand, fail, say};
use crate::pki;

pub(super) fn run(command: &PkiCommand) -> ExitCode {
    match command {
        PkiCommand::Init { dir, name, days } => match pki::init(dir, name.as_deref(), *days) {
            Ok(files) => {
                say(format_args!("CA certificate: {}", files.cert.display()));
                say(format_args!(
                    "CA key:         {} (keep it secret, keep it safe)",
                    files.key.display()
                ));
                say(format_args!(
                    "tenant's key:   {} (for all gateways that shall know each other's pages)",
                    dir.join(pki::TENANT_KEY).display()
                ));
                say("Next, for each gateway:");
                say(format_args!(
                    "  skyferry pki issue --dir {} --name edge-a",
                    dir.display()
                ));
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
                say(format_args!("certificate: {}", files.cert.display()));
                say(format_args!("key:         {}", files.key.display()));
                if files.cut_to_ca {
                    say("It expires with the CA, sooner than asked for.");
                }
                let name = name.to_ascii_lowercase();
                say(
                    "Next: copy these two, ca.pem and tenant.key to the gateway, never ca.key, and set there:",
                );
                say("  [gateway]");
                say(format_args!("  name = \"{name}\""));
                say("  [tls]");
                say("  ca = \"ca.pem\"");
                say(format_args!("  cert = \"{name}.pem\""));
                say(format_args!("  key = \"{name}.key\""));
                say("  [[tenant]]");
                say("  name = \"default\"");
                say(format_args!("  secret_file = \"{}\"", pki::TENANT_KEY));
                ExitCode::SUCCESS
            }
            Err(error) => fail(error),
        },
    }
}

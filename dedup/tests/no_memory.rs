//! The store in memory when the system has none to give: a process of its own with a limit.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeOptions, Flush,
    KnownPages, MemoryStore, PageStore,
};

const CHILD: &str = "SKYFERRY_TEST_NO_MEMORY";

/// What is left to the process: less than a slab of a store takes, 8 MiB, and enough for all else.
const LEFT: u64 = 6 << 20;

/// A store whose slabs are of the full size.
fn store() -> MemoryStore {
    MemoryStore::new(512 << 20)
}

/// Address space of this process in bytes.
fn taken() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let kib = size.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() << 10
}

fn limit(most: Option<u64>) {
    let Rlimit { maximum, .. } = getrlimit(Resource::As);
    let current = most.or(maximum);
    setrlimit(Resource::As, Rlimit { current, maximum }).unwrap();
}

/// Both ends of a channel, and what has come out.
struct Channel {
    encoder: ChannelEncoder,
    decoder: ChannelDecoder,
    known: KnownPages,
    out: Vec<u8>,
}

impl Channel {
    fn carry(&mut self, mut input: &[u8], near: &MemoryStore, far: &MemoryStore) {
        loop {
            let known = Some(&self.known);
            let encoded = self.encoder.encode(input, Flush::Hard, known, Some(near));
            let encoded = encoded.unwrap();
            input = &input[encoded.consumed..];
            let Some(frame) = encoded.frame else {
                if encoded.consumed == 0 && encoded.events.is_empty() {
                    return;
                }
                continue;
            };
            let mut pending = self.decoder.begin(&frame.payload, far).unwrap();
            for index in pending.missing().to_vec() {
                let page = frame.retained.page(index).unwrap();
                pending.fill(index, page).unwrap();
            }
            let finished = self.decoder.finish(&mut pending, far).unwrap();
            self.out.extend_from_slice(&finished.bytes);
        }
    }
}

/// Not a test: what the next one starts, because the limit is the process's.
#[test]
fn child_without_memory() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", 2000)])
        .rounds(2)
        .build();
    let (key, kind) = (DomainKey::from_bytes([1; 32]), ChannelKind::QemuMain);
    let mut channel = Channel {
        encoder: ChannelEncoder::new(kind, &key, EncodeOptions::default()),
        decoder: ChannelDecoder::new(kind, &key, DecodeLimits::default()),
        known: KnownPages::new(4000),
        out: Vec::with_capacity(stream.bytes.len()),
    };
    let (first, second) = stream.bytes.split_at(stream.bytes.len() / 2);
    channel.carry(first, &store(), &store());

    let (near, far) = (store(), store());
    limit(Some(taken() + LEFT));
    channel.carry(second, &near, &far);
    limit(None);
    assert!(channel.out == stream.bytes);
    for store in [&near, &far] {
        let stats = store.stats();
        println!("{stats:?}");
        assert!(stats.dropped_puts > 100 && stats.pages == 0, "{stats:?}");
    }
    // There is memory again.
    let before = far.stats().dropped_puts;
    let mut channel = Channel {
        encoder: ChannelEncoder::new(kind, &key, EncodeOptions::default()),
        decoder: ChannelDecoder::new(kind, &key, DecodeLimits::default()),
        known: KnownPages::new(4000),
        out: Vec::new(),
    };
    channel.carry(&stream.bytes, &near, &far);
    assert!(channel.out == stream.bytes);
    let stats = far.stats();
    assert!(
        stats.pages > 500 && stats.dropped_puts == before,
        "{stats:?}"
    );
    println!("\nlived through it");
}

#[test]
fn a_store_that_gets_no_memory_keeps_nothing_and_fails_nothing() {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_without_memory", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    let lived = child.status.success() && said.contains("lived through it");
    assert!(lived, "{said}{}", String::from_utf8_lossy(&child.stderr));
}

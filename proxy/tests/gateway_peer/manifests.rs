//! Asking for what a guest held, and building on what was not agreed on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use skyferry::config::Config;
use skyferry::wire::control::{ChannelPosition, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, DataHeader, MigrationId};
use skyferry_core::qemu::synthetic::SyntheticStream;
use skyferry_dedup::disk::{DiskOptions, DiskStore};
use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeLimits, DomainKey, EncodeOptions, Flush,
    Manifest, MemoryStore,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::peer::{Peer, encoder, endpoint, frame_of, hello};
use crate::rig::{Gateway, Site, soon};

fn adopt(migration: MigrationId, channel: u32) -> Control {
    Control::Adopt {
        migration,
        channel,
        manifest: [9; 16],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_agreed_to() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let mut peer = Peer::good(&gateway, &site).await;
    let main = peer.open_to_new_target(StreamKind::QemuMain).await;
    let opaque = peer.open_to_new_target(StreamKind::Opaque).await;
    // Of what is not known nothing is said, however often it is asked for.
    for _ in 0..1000 {
        peer.say(adopt(MigrationId([77; 16]), 0)).await;
        peer.say(adopt(main.migration, 5)).await;
    }
    for id in [main.migration, main.migration, opaque.migration] {
        peer.say(adopt(id, 0)).await;
        let answer = peer.hear(|m| matches!(m, Control::Adopted { .. })).await;
        let refused = Control::Adopted {
            migration: id,
            channel: 0,
            manifest: [9; 16],
            agreed: false,
        };
        assert!(answer == refused);
    }
    // The answer is the far gateway's to give.
    peer.say(Control::Adopted {
        migration: main.migration,
        channel: 0,
        manifest: [9; 16],
        agreed: true,
    })
    .await;
    let text = peer.closed().await;
    assert!(text.contains("is not for this side"), "{text}");
    gateway.expect_good(&site).await;
}

/// The frame cannot be right, whatever is in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_was_not_agreed_on_ends_the_channel() {
    let site = Site::new();
    let mut gateway = Gateway::far(&site);
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", 100)])
        .build();
    let mut before = encoder(ChannelKind::QemuMain);
    let encoded = before.encode(&stream.bytes, Flush::Hard, None, None);
    assert!(encoded.unwrap().frame.is_some());
    let manifest = Arc::new(before.take_table().into_manifest().unwrap());

    let mut peer = Peer::good(&gateway, &site).await;
    let mut channel = peer.open_to_new_target(StreamKind::QemuMain).await;
    channel.encoder.adopt(&manifest);
    let first = frame_of(&mut channel.encoder, &stream.bytes[..stream.records[0].at]);
    let plain = DataFlags::default();
    channel.send_payload(&peer, &first.payload, plain).await;
    let _socket = soon("a dial", channel.target.accept()).await.unwrap();
    let (code, reason) = peer.hear_reset(channel.migration, 0).await;
    assert_eq!(code, ResetCode::Internal);
    assert!(reason.contains("not agreed on"), "{reason}");
    gateway.expect_good(&site).await;
}

/// The key of the only tenant.
fn domain(config: &Config) -> DomainKey {
    let secret = config.tenant("default").unwrap().secret.clone().unwrap();
    DomainKey::derive(secret.as_bytes(), "default")
}

/// What a guest held that had moved with this stream.
fn left_by(stream: &[u8], key: &DomainKey) -> Manifest {
    let kind = ChannelKind::QemuMain;
    let mut encoder = ChannelEncoder::new(kind, key, EncodeOptions::default());
    let mut rest = stream;
    loop {
        let encoded = encoder.encode(rest, Flush::Hard, None, None).unwrap();
        if encoded.consumed == 0 && encoded.frame.is_none() {
            return encoder.take_table().into_manifest().unwrap();
        }
        rest = &rest[encoded.consumed..];
    }
}

/// What comes of a channel whose frames arrive on one connection after the other.
struct Arriving {
    migration: MigrationId,
    frames: BTreeMap<u64, Vec<u8>>,
    next: u64,
}

impl Arriving {
    /// Takes frames and says so, until none has come for a while.
    async fn take(&mut self, peer: &mut Peer) {
        const QUIET: Duration = Duration::from_millis(500);
        let (quinn, (come, mut coming)) = (peer.quinn.clone(), mpsc::unbounded_channel());
        let taking = tokio::spawn(async move {
            while let Ok(mut stream) = quinn.accept_uni().await {
                let bytes = stream.read_to_end(4 << 20).await.unwrap();
                let (header, payload) = bytes.split_first_chunk::<34>().unwrap();
                let header = DataHeader::decode(header).unwrap();
                come.send((header.seq, payload.to_vec())).unwrap();
            }
        });
        while let Ok(Some((seq, payload))) = tokio::time::timeout(QUIET, coming.recv()).await {
            self.frames.insert(seq, payload);
            while self.frames.contains_key(&self.next) {
                self.next += 1;
            }
            peer.say(Control::Ack {
                migration: self.migration,
                channel: 0,
                next_seq: self.next,
            })
            .await;
        }
        taking.abort();
    }
}

/// The far gateway's answer is on its way when the connection goes. The near gateway asks on the next.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_lost_is_asked_for_again() {
    let stream = SyntheticStream::builder()
        .blocks(&[("pc.ram", 4000)])
        .zero_percent(10)
        .build();
    let site = Site::new();
    let acceptor = endpoint(&site.identity("edge-b"));
    let gateway = Gateway::near_that_remembers(&site, acceptor.local_addr().unwrap(), &|config| {
        let disk = config.store.disk.as_ref().unwrap();
        let options = DiskOptions::new(&disk.path, disk.size_bytes);
        let store = DiskStore::open(options, &disk.key).unwrap();
        let manifest = left_by(&stream.bytes, &domain(config));
        store.save_manifest("edge-b", &manifest).unwrap();
        drop(store);
        // A child that another test is just starting has the lock, too, until it runs its own program.
        let lock = std::fs::File::open(disk.path.join("lock")).unwrap();
        lock.lock().unwrap();
    });
    gateway
        .expect_metric("skyferry_manifests", |kept| kept == 1.0)
        .await;
    let greeting = hello("edge-b", (1, 1), [1; 16]);
    let mut peer = Peer::accept(&acceptor, &greeting).await.unwrap();
    // Three parts of the guest's RAM, each when it is asked for.
    let mut source = soon("a connection", TcpStream::connect(gateway.ingress))
        .await
        .unwrap();
    let (go, mut went) = mpsc::unbounded_channel();
    let ends = [2500, 3000, 3500].map(|record| stream.records[record].at);
    let bytes = stream.bytes.clone();
    let sending = tokio::spawn(async move {
        let mut from = 0;
        for end in ends {
            went.recv().await.unwrap();
            source.write_all(&bytes[from..end]).await.unwrap();
            from = end;
        }
        source
    });

    go.send(()).unwrap();
    let migration = peer.take_open().await;
    let (frames, next) = (BTreeMap::new(), 0);
    let mut arriving = Arriving {
        migration,
        frames,
        next,
    };
    arriving.take(&mut peer).await;
    let asked = peer.hear(|m| matches!(m, Control::Adopt { .. })).await;
    peer.quinn.close(0_u32.into(), b"");

    let mut peer = Peer::accept(&acceptor, &greeting).await.unwrap();
    peer.hear(|m| matches!(m, Control::Resume { .. })).await;
    let channels = vec![ChannelPosition {
        channel: 0,
        next_seq: arriving.next,
    }];
    peer.say(Control::Resumed {
        migration,
        known: true,
        released: false,
        channels,
    })
    .await;
    go.send(()).unwrap();
    arriving.take(&mut peer).await;
    let again = peer.hear(|m| matches!(m, Control::Adopt { .. })).await;
    assert!(again == asked);
    let Control::Adopt { manifest, .. } = again else {
        unreachable!()
    };
    peer.say(Control::Adopted {
        migration,
        channel: 0,
        manifest,
        agreed: true,
    })
    .await;
    go.send(()).unwrap();
    arriving.take(&mut peer).await;
    gateway
        .expect_metric("skyferry_manifests_adopted_total", |adopted| adopted == 1.0)
        .await;

    // What is built on it is the guest.
    let config = Config::load(&site.dir.path().join("edge-a.toml")).unwrap();
    let key = domain(&config);
    let kind = ChannelKind::QemuMain;
    let mut decoder = ChannelDecoder::new(kind, &key, DecodeLimits::default());
    decoder.agree(Arc::new(left_by(&stream.bytes, &key)));
    let store = MemoryStore::new(64 << 20);
    let mut came = Vec::new();
    for payload in arriving.frames.values() {
        let mut pending = decoder.begin(payload, &store).unwrap();
        assert!(pending.missing().is_empty());
        came.extend(decoder.finish(&mut pending, &store).unwrap().bytes);
    }
    assert!(stream.bytes.starts_with(&came));
    assert!(came.len() > ends[1], "{} of {} bytes", came.len(), ends[2]);
    drop(sending.await.unwrap());
}

//! The other end of a gateway's link in the hands of a test.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use quinn::{Connection, RecvStream, SendStream};
use skyferry::transport::{Identity, LinkEndpoint, TransportSettings, explain};
use skyferry::wire::control::{ChannelPosition, ResetCode, StreamKind};
use skyferry::wire::{Control, DataFlags, DataHeader, DataKind, InstanceId, MigrationId};
use skyferry_dedup::{ChannelEncoder, ChannelKind, DomainKey, EncodeOptions, Flush, Frame};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

use crate::rig::{Gateway, Site, soon};

/// The domain key of all channels here.
pub(crate) const DOMAIN: [u8; 32] = [7; 32];

/// An endpoint of the test's own.
pub(crate) fn endpoint(identity: &Identity) -> LinkEndpoint {
    endpoint_at("127.0.0.1", identity)
}

/// The same at another address of this machine.
pub(crate) fn endpoint_at(address: &str, identity: &Identity) -> LinkEndpoint {
    let address = format!("{address}:0").parse().unwrap();
    LinkEndpoint::bind(address, 256 << 10, identity, &TransportSettings::default()).unwrap()
}

/// A hello as a good gateway says it.
pub(crate) fn hello(name: &str, versions: (u16, u16), instance: InstanceId) -> Control {
    Control::Hello {
        version_min: versions.0,
        version_max: versions.1,
        instance,
        name: name.to_owned(),
        store_pages: 1024,
        receive_budget: 64 << 20,
        places: 1 << 20,
        predecessors: Vec::new(),
    }
}

/// One end of a connection, in the test's hands.
pub(crate) struct Peer {
    _endpoint: LinkEndpoint,
    pub(crate) quinn: Connection,
    pub(crate) send: SendStream,
    pub(crate) recv: RecvStream,
    /// A question for this side's clock that was passed over.
    asked: Option<u64>,
    /// The gateway's process, and those before it of which it says that it knows what they released.
    pub(crate) told: (InstanceId, Vec<InstanceId>),
}

impl Peer {
    /// Connects to the far gateway and opens the control stream; says nothing.
    pub(crate) async fn connect(gateway: &Gateway, identity: &Identity) -> Result<Self, String> {
        let endpoint = endpoint(identity);
        let connecting = endpoint.connect(gateway.wan, "edge-b").unwrap();
        let quinn = soon("a handshake", connecting)
            .await
            .map_err(|e| explain(&e))?;
        let (send, recv) = quinn.open_bi().await.map_err(|e| explain(&e))?;
        Ok(Self {
            _endpoint: endpoint,
            quinn,
            send,
            recv,
            asked: None,
            told: Default::default(),
        })
    }

    /// `edge-a`, greeted, in a new process as far as the gateway can tell.
    pub(crate) async fn good(gateway: &Gateway, site: &Site) -> Self {
        Self::with_instance(gateway, site, new_id()).await
    }

    /// `edge-a`, greeted.
    pub(crate) async fn with_instance(
        gateway: &Gateway,
        site: &Site,
        instance: InstanceId,
    ) -> Self {
        Self::back(gateway, site, instance, vec![]).await
    }

    /// A peer that has said hello and nothing else.
    pub(crate) async fn greeted(
        gateway: &Gateway,
        site: &Site,
        name: &str,
        instance: InstanceId,
    ) -> Self {
        let mut peer = Self::connect(gateway, &site.identity(name)).await.unwrap();
        peer.say(hello(name, (1, 1), instance)).await;
        let hello = peer.hear(|m| matches!(m, Control::Hello { .. })).await;
        if let Control::Hello {
            instance,
            predecessors,
            ..
        } = hello
        {
            peer.told = (instance, predecessors);
        }
        peer
    }

    /// The same process as `instance` on a new connection; it still has these migrations.
    pub(crate) async fn back(
        gateway: &Gateway,
        site: &Site,
        instance: InstanceId,
        migrations: Vec<MigrationId>,
    ) -> Self {
        let mut peer = Self::greeted(gateway, site, "edge-a", instance).await;
        peer.say(Control::Live { migrations }).await;
        peer
    }

    /// The connection is lost, and the gateway has noticed.
    pub(crate) async fn lose(self, gateway: &Gateway) {
        drop(self);
        gateway.expect_log(&["link from peer ended"]).await;
    }

    /// Resumes a migration, with channels at these positions. Returns whether it is known there, and
    /// where its channels stand.
    pub(crate) async fn resume(
        &mut self,
        migration: MigrationId,
        channels: Vec<ChannelPosition>,
    ) -> (bool, Vec<ChannelPosition>) {
        self.say(Control::Resume {
            migration,
            channels,
        })
        .await;
        let message = self.hear(|m| matches!(m, Control::Resumed { .. })).await;
        let Control::Resumed {
            migration: of,
            known,
            channels,
            ..
        } = message
        else {
            unreachable!()
        };
        assert_eq!(of, migration);
        (known, channels)
    }

    /// Waits for the next message of those that are `wanted`, up to where the gateway answers what is
    /// asked behind all messages so far. `None`: there was none.
    pub(crate) async fn hear_up_to_now(
        &mut self,
        wanted: impl Fn(&Control) -> bool,
    ) -> Option<Control> {
        const NOW: u64 = 4711;
        self.say(Control::Ping { nonce: NOW }).await;
        let answer = |m: &Control| matches!(m, Control::Pong { nonce: NOW, .. });
        let message = self.hear(|m| wanted(m) || answer(m)).await;
        (!answer(&message)).then_some(message)
    }

    /// Says what this side's clock shows as often as the gateway needs to be told.
    pub(crate) async fn tell_clock(&mut self) {
        for _ in 0..2 {
            if !self.answer_clock().await {
                let question = self.hear(|m| matches!(m, Control::Ping { .. })).await;
                if let Control::Ping { nonce } = question {
                    self.asked = Some(nonce);
                }
                self.answer_clock().await;
            }
        }
    }

    /// Says it if that was asked; false when it was not.
    pub(crate) async fn answer_clock(&mut self) -> bool {
        let Some(nonce) = self.asked.take() else {
            return false;
        };
        let clock = clock();
        self.say(Control::Pong { nonce, clock }).await;
        true
    }

    /// Accepts a gateway that dials and takes its control stream and hello.
    pub(crate) async fn accept(endpoint: &LinkEndpoint, answer: &Control) -> Result<Self, String> {
        let incoming = soon("a dial", endpoint.accept()).await.unwrap();
        let quinn = soon("a handshake", incoming.accept().unwrap())
            .await
            .map_err(|e| explain(&e))?;
        let (mut send, recv) = quinn.accept_bi().await.map_err(|e| explain(&e))?;
        send.write_all(&encoded(answer))
            .await
            .map_err(|e| e.to_string())?;
        let mut peer = Self {
            _endpoint: endpoint.clone(),
            quinn,
            send,
            recv,
            asked: None,
            told: Default::default(),
        };
        peer.hear(|message| matches!(message, Control::Hello { .. }))
            .await;
        Ok(peer)
    }

    /// Sends a message.
    pub(crate) async fn say(&mut self, message: Control) {
        self.raw(&encoded(&message)).await;
    }

    /// Sends bytes on the control stream. That the gateway may have closed it is no error.
    pub(crate) async fn raw(&mut self, bytes: &[u8]) {
        let _ = self.send.write_all(bytes).await;
    }

    /// Waits for a message and returns it; others are passed over.
    pub(crate) async fn hear(&mut self, wanted: impl Fn(&Control) -> bool) -> Control {
        soon("a message", async {
            loop {
                let message = self
                    .next()
                    .await
                    .unwrap_or_else(|e| panic!("no message: {e}"));
                if wanted(&message) {
                    return message;
                }
                if let Control::Ping { nonce } = message {
                    self.asked = Some(nonce);
                }
            }
        })
        .await
    }

    async fn next(&mut self) -> Result<Control, String> {
        let mut len = [0; 4];
        self.recv
            .read_exact(&mut len)
            .await
            .map_err(|e| format!("{e} {:?}", self.quinn.close_reason()))?;
        let mut body = vec![0; u32::from_le_bytes(len) as usize];
        self.recv
            .read_exact(&mut body)
            .await
            .map_err(|e| e.to_string())?;
        Control::decode(&body).map_err(|e| e.to_string())
    }

    /// Waits for the gateway to open the first channel of a migration, and says that it is.
    pub(crate) async fn take_open(&mut self) -> MigrationId {
        let message = self.hear(|m| matches!(m, Control::Open { .. })).await;
        let Control::Open { migration: id, .. } = message else {
            unreachable!()
        };
        self.say(Control::Opened {
            migration: id,
            channel: 0,
        })
        .await;
        id
    }

    /// Waits for a reset of the channel and returns why.
    pub(crate) async fn hear_reset(&mut self, id: MigrationId, no: u32) -> (ResetCode, String) {
        let message = self
            .hear(|message| {
                matches!(message, Control::Reset { migration, channel, .. }
                    if *migration == id && *channel == no)
            })
            .await;
        let Control::Reset { code, reason, .. } = message else {
            unreachable!()
        };
        (code, reason)
    }

    /// Waits until the gateway closes the connection and returns its words.
    pub(crate) async fn closed(&self) -> String {
        explain(&soon("a close", self.quinn.closed()).await)
    }

    /// Sends a data stream.
    pub(crate) async fn data(&self, header: [u8; 34], payload: &[u8]) {
        let mut stream = soon("a stream", self.quinn.open_uni()).await.unwrap();
        let _ = stream.write_all(&header).await;
        let _ = stream.write_all(payload).await;
        let _ = stream.finish();
    }

    /// Opens a channel to a listener of the test.
    pub(crate) async fn open_to_new_target(&mut self, kind: StreamKind) -> Channel {
        let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = target.local_addr().unwrap().to_string();
        let migration = MigrationId(new_id());
        self.say(open(migration, 0, kind, false, &address)).await;
        let kind = match kind {
            StreamKind::QemuMain => ChannelKind::QemuMain,
            StreamKind::Opaque => ChannelKind::Opaque,
        };
        Channel {
            migration,
            no: 0,
            target,
            encoder: encoder(kind),
            seq: 0,
        }
    }

    /// Opens a channel to a listener of the test, which gets these bytes and has been dialled for them.
    pub(crate) async fn open_and_send(&mut self, bytes: &[u8]) -> (Channel, TcpStream) {
        let mut channel = self.open_to_new_target(StreamKind::Opaque).await;
        channel.send(self, bytes, DataFlags::default()).await;
        let (mut socket, _) = soon("a dial", channel.target.accept()).await.unwrap();
        let mut got = vec![0; bytes.len()];
        soon("the bytes", socket.read_exact(&mut got))
            .await
            .unwrap();
        assert_eq!(got, bytes);
        self.hear(|m| matches!(m, Control::Ack { next_seq: 1, .. }))
            .await;
        (channel, socket)
    }
}

/// The clock of the tests' gateways in microseconds.
pub(crate) fn clock() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_micros()).unwrap()
}

/// Another one each time.
pub(crate) fn new_id() -> [u8; 16] {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut id = [128; 16];
    id[..8].copy_from_slice(&COUNT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    id
}

/// A message as it goes on the wire.
pub(crate) fn encoded(message: &Control) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

/// An open message.
pub(crate) fn open(
    migration: MigrationId,
    channel: u32,
    kind: StreamKind,
    dial_now: bool,
    target: &str,
) -> Control {
    let target = target.to_owned();
    Control::Open {
        migration,
        channel,
        kind,
        dial_now,
        target,
        domain: DOMAIN,
    }
}

/// An encoder for a channel of these tests.
pub(crate) fn encoder(kind: ChannelKind) -> ChannelEncoder {
    ChannelEncoder::new(
        kind,
        &DomainKey::from_bytes(DOMAIN),
        EncodeOptions::default(),
    )
}

/// The header of a data stream.
pub(crate) fn header(
    kind: DataKind,
    flags: DataFlags,
    migration: MigrationId,
    seq: u64,
    len: u32,
) -> [u8; 34] {
    DataHeader {
        kind,
        flags,
        migration,
        channel: 0,
        seq,
        len,
    }
    .encode()
}

/// A channel of the test to a target of the test.
pub(crate) struct Channel {
    pub(crate) migration: MigrationId,
    pub(crate) no: u32,
    pub(crate) target: TcpListener,
    pub(crate) encoder: ChannelEncoder,
    pub(crate) seq: u64,
}

impl Channel {
    /// Sends bytes as the next frame; returns how many.
    pub(crate) async fn send(&mut self, peer: &Peer, bytes: &[u8], flags: DataFlags) -> usize {
        let frame = frame_of(&mut self.encoder, bytes);
        self.send_payload(peer, &frame.payload, flags).await;
        bytes.len()
    }

    /// Sends a payload as the next frame.
    pub(crate) async fn send_payload(&mut self, peer: &Peer, payload: &[u8], flags: DataFlags) {
        let len = u32::try_from(payload.len()).unwrap();
        let header = header(DataKind::Frame, flags, self.migration, self.seq, len);
        peer.data(header, payload).await;
        self.seq += 1;
    }

    /// Where the stream stands behind the frames made so far.
    pub(crate) fn position(&self, next_seq: u64) -> ChannelPosition {
        ChannelPosition {
            channel: self.no,
            next_seq,
        }
    }
}

/// One frame of these bytes.
pub(crate) fn frame_of(encoder: &mut ChannelEncoder, bytes: &[u8]) -> Frame {
    let mut rest = bytes;
    loop {
        let encoded = encoder.encode(rest, Flush::Hard, None, None).unwrap();
        rest = &rest[encoded.consumed..];
        if let Some(frame) = encoded.frame {
            assert!(rest.is_empty(), "one frame was to be enough");
            return frame;
        }
    }
}

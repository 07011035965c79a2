//! Puts a channel's frames on the wire, one QUIC stream each.

use bytes::Bytes;

use super::{channel::Channel, link::Conn, migration::Migration};
use crate::{
    session::Class,
    wire::{DataFlags, DataHeader, DataKind, MigrationId},
};

/// Sends the channel's frames on whichever connection it is attached to. Ends only by being
/// dropped.
pub(super) async fn transmit(migration: &Migration, channel: &Channel) -> ! {
    loop {
        let conn = channel.connected(&migration.link).await;
        while let Ok(next) = channel.poll_transmit(conn.generation) {
            let Some(frame) = next else {
                tokio::select! {
                    () = channel.work.notified() => continue,
                    _ = conn.quinn.closed() => break,
                }
            };
            let header = DataHeader {
                kind: DataKind::Frame,
                flags: frame.flags,
                migration: migration.id,
                channel: channel.no,
                seq: frame.seq,
                // Frames are made within the limit, far below 4 GiB.
                len: u32::try_from(frame.payload.len()).unwrap_or(u32::MAX),
            };
            match send(&conn, frame.class, &header, frame.payload).await {
                // The peer has the frame already, from a connection before this one.
                Ok(()) | Err(quinn::WriteError::Stopped(_)) => {}
                Err(_) => break,
            }
        }
        // The connection is gone, or the channel is on a newer one: wait for the news.
        let (mut conns, mut attached) = (migration.link.watch(), channel.attachment());
        loop {
            let current = conns.borrow_and_update().as_ref().map(|now| now.generation);
            if current != Some(conn.generation) || *attached.borrow_and_update() != conn.generation
            {
                break;
            }
            tokio::select! {
                // The senders live as long as the link and the channel.
                _ = conns.changed() => {}
                _ = attached.changed() => {}
            }
        }
    }
}

/// Sends the pages that a miss asked for.
pub(super) async fn send_pages(
    conn: &Conn,
    migration: MigrationId,
    channel: u32,
    seq: u64,
    payload: Vec<u8>,
) -> Result<(), quinn::WriteError> {
    let header = DataHeader {
        kind: DataKind::Pages,
        flags: DataFlags::default(),
        migration,
        channel,
        seq,
        len: u32::try_from(payload.len()).unwrap_or(u32::MAX),
    };
    send(conn, Class::Urgent, &header, payload.into()).await
}

async fn send(
    conn: &Conn,
    class: Class,
    header: &DataHeader,
    payload: Bytes,
) -> Result<(), quinn::WriteError> {
    let mut stream = conn.quinn.open_uni().await?;
    stream.set_priority(conn.next_priority(class))?;
    let header = Bytes::copy_from_slice(&header.encode());
    stream.write_all_chunks(&mut [header, payload]).await?;
    stream.finish()?;
    Ok(())
}

use super::*;

const ID: MigrationId = MigrationId(*b"0123456789abcdef");

fn every_message() -> Vec<Control> {
    vec![
        Control::Hello {
            version_min: 1,
            version_max: 2,
            instance: [7; 16],
            name: "edge-a".into(),
            store_pages: 131_072,
            receive_budget: 1 << 26,
            places: 1 << 19,
            predecessors: vec![[8; 16], [9; 16]],
        },
        Control::Open {
            migration: ID,
            channel: 1,
            kind: StreamKind::QemuMain,
            dial_now: false,
            target: "10.0.0.5:4444".into(),
            domain: [9; 32],
        },
        Control::Opened {
            migration: ID,
            channel: 1,
        },
        Control::Ack {
            migration: ID,
            channel: 1,
            next_seq: 77,
        },
        Control::Miss {
            migration: ID,
            channel: 1,
            seq: 5,
            indexes: vec![0, 3, 9],
        },
        Control::Reset {
            migration: ID,
            channel: 1,
            after_seq: 3,
            code: ResetCode::TargetUnreachable,
            released: false,
            reason: "connection refused".into(),
        },
        Control::Commit {
            migration: ID,
            channel: 0,
            digests: vec![ChannelDigest {
                channel: 0,
                offset: 99,
                digest: [3; 16],
            }],
            clock: 1_700_000,
        },
        Control::AskCommit { migration: ID },
        Control::Committed { migration: ID },
        Control::Resume {
            migration: ID,
            channels: vec![ChannelPosition {
                channel: 0,
                next_seq: 4,
            }],
        },
        Control::Resumed {
            migration: ID,
            known: true,
            released: false,
            channels: vec![],
        },
        Control::Close { migration: ID },
        Control::Interest(Interest {
            store: [5; 16],
            capacity_pages: 1000,
            segments: vec![(3, 4), (9, 16_000)],
            domains: vec![[8; 32]],
        }),
        Control::Live {
            migrations: vec![ID, ID],
        },
        Control::Adopt {
            migration: ID,
            channel: 3,
            manifest: [6; 16],
        },
        Control::Adopted {
            migration: ID,
            channel: 3,
            manifest: [6; 16],
            agreed: true,
        },
        Control::Ping { nonce: 1 },
        Control::Pong { nonce: 1, clock: 9 },
    ]
}

#[test]
fn round_trip_every_prefix_refused_no_leftovers() {
    for message in every_message() {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let (len, body) = bytes.split_first_chunk::<4>().unwrap();
        assert_eq!(u32::from_le_bytes(*len) as usize, body.len());
        assert!(
            Control::decode(body).as_ref() == Ok(&message),
            "{message:?}"
        );
        for end in 0..body.len() {
            assert!(
                Control::decode(&body[..end]).is_err(),
                "{message:?} cut at {end}"
            );
        }
        let mut longer = body.to_vec();
        longer.push(0);
        assert_eq!(Control::decode(&longer).err(), Some(WireError::Trailing(1)));
    }
}

#[test]
fn golden_ack() {
    let mut bytes = Vec::new();
    Control::Ack {
        migration: ID,
        channel: 2,
        next_seq: 3,
    }
    .encode(&mut bytes);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        "1d0000000430313233343536373839616263646566020000000300000000000000"
    );
}

#[test]
fn unknown_types_and_long_lists_are_refused() {
    assert_eq!(Control::decode(&[0]), Err(WireError::UnknownType(0)));
    assert_eq!(Control::decode(&[19]), Err(WireError::UnknownType(19)));
    let mut miss = vec![5];
    miss.extend_from_slice(&ID.0);
    miss.extend_from_slice(&[0; 12]);
    miss.extend_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(Control::decode(&miss), Err(WireError::TooLong("indexes")));
}

#[test]
fn no_secret_in_debug_output() {
    assert!(
        every_message()
            .iter()
            .all(|message| !format!("{message:?}").contains("9, 9"))
    );
}

#[test]
fn long_strings_are_cut_at_a_character() {
    let reason = "ä".repeat(2000);
    let mut bytes = Vec::new();
    Control::Reset {
        migration: ID,
        channel: 0,
        after_seq: 0,
        code: ResetCode::Internal,
        released: false,
        reason,
    }
    .encode(&mut bytes);
    let Ok(Control::Reset { reason, .. }) = Control::decode(&bytes[4..]) else {
        panic!("not a reset");
    };
    assert_eq!(reason.len(), MAX_STRING);
}

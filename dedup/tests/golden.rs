//! Frames as `docs/protocol.md`, section "Page frames", lays them down, built here from that text and
//! not with the codec's own parts.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use skyferry_dedup::{
    ChannelDecoder, ChannelEncoder, ChannelKind, DecodeError, DecodeLimits, DomainId, DomainKey,
    EncodeOptions, Flush, Hasher, MemoryStore, PAGE_SIZE, PageId, PageStore, ShortId, StoreStats,
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<char> = hex.chars().filter(|digit| !digit.is_whitespace()).collect();
    let pair = |pair: &[char]| u8::from_str_radix(&String::from_iter(pair), 16).unwrap();
    digits.chunks(2).map(pair).collect()
}

const KEY: [u8; 32] = [0x42; 32];

/// "Stream digest": the skeleton's keyed hash.
fn digest(skeleton: &[u8]) -> String {
    let key = blake3::derive_key("skyferry v1 stream digest key", &KEY);
    hex(&blake3::keyed_hash(&key, skeleton).as_bytes()[..16])
}

fn decoder(kind: ChannelKind) -> ChannelDecoder {
    ChannelDecoder::new(kind, &DomainKey::from_bytes(KEY), DecodeLimits::default())
}

#[test]
fn the_domain_key_follows_from_secret_and_tenant() {
    let mut input = 6_u64.to_le_bytes().to_vec();
    input.extend_from_slice(b"secrettenant");
    let expected = blake3::derive_key("skyferry v1 dedup domain key", &input);
    assert_eq!(DomainKey::derive(b"secret", "tenant").as_bytes(), &expected);
}

#[test]
fn a_small_message() {
    let key = DomainKey::from_bytes(KEY);
    let mut encoder = ChannelEncoder::new(ChannelKind::Opaque, &key, EncodeOptions::default());
    let frame = encoder
        .encode(b"hello", Flush::Hard, None, None)
        .unwrap()
        .frame
        .unwrap();
    let digest = digest(b"hello");
    // flags, raw length, digest, program length, references, literal length, program, literals
    assert_eq!(
        hex(&frame.payload),
        format!("00 05 {digest} 01 00 05 58 68656c6c6f").replace(' ', "")
    );
    assert_eq!(digest, "5598de26cc8f81fcd52014d8883a1745");
}

#[test]
fn chunks() {
    let (new, known) = ([b'n'; 1024], [b'k'; 4000]);
    let ids = [&new[..], &known].map(|chunk| *blake3::keyed_hash(&KEY, chunk).as_bytes());
    let digest = digest(&ids.concat());
    let id = hex(&ids[1][..16]);
    // 5024 bytes; a chunk of 1024, a reference to one of 4000
    let head = format!("00 a027 {digest} 06 01 8008 898001 8af403");
    let payload = bytes(&format!("{head} {id} {}", hex(&new)));
    let store = MemoryStore::new(1 << 20);
    let mut decoder = decoder(ChannelKind::Opaque);
    let mut pending = decoder.begin(&payload, &store).unwrap();
    pending.fill(0, &known).unwrap();
    let finished = decoder.finish(&mut pending, &store).unwrap();
    assert!(finished.bytes == [&new[..], &known].concat());
    assert_eq!(store.stats().pages, 2);
}

#[test]
fn every_operation() {
    let page = [0x5a; PAGE_SIZE];
    let id = *blake3::keyed_hash(&KEY, &page).as_bytes();
    let zero_id = *blake3::keyed_hash(&KEY, &[0; PAGE_SIZE]).as_bytes();

    // The stream: records of block "ram", then three other bytes.
    let records: [(&str, &[u8], [u8; 32]); 4] = [
        ("0000000000001002 03 72616d 00", &[], [0; 32]), // zero, named, page 1
        ("0000000000002022 00", &[], [0; 32]),           // zero, page 2
        ("0000000000003028", &[0; PAGE_SIZE], zero_id),  // page of zeroes, page 3
        ("0000000000009028", &page, id),                 // page 9
    ];
    let (mut stream, mut skeleton) = (Vec::new(), Vec::new());
    for (head, contents, id) in records {
        stream.extend(bytes(head));
        skeleton.extend(bytes(head));
        stream.extend_from_slice(contents);
        if !contents.is_empty() {
            skeleton.extend_from_slice(&id);
        }
    }
    stream.extend_from_slice(b"end");
    skeleton.extend_from_slice(b"end");

    // define "ram"; seek block 0, named, page 1; 2 zero; 1 zero data; skip 5; 1 reference; 3 other
    let program = "37 72616d  16 01  21  14  55  13  38";
    let raw_len = stream.len() as u16;
    assert!((0x80..0x4000).contains(&raw_len));
    let raw_len = [raw_len as u8 | 0x80, (raw_len >> 7) as u8];
    let frame = |program: &str, literals: &str| {
        let program = bytes(program);
        let (digest, id) = (digest(&skeleton), hex(&id[..16]));
        let head = format!("00 {} {digest} {:02x} 01 03", hex(&raw_len), program.len());
        bytes(&format!("{head} {} {id} {literals}", hex(&program)))
    };
    let store = MemoryStore::new(1 << 20);
    let mut decoder_ = decoder(ChannelKind::QemuMain);
    let mut pending = decoder_.begin(&frame(program, "656e64"), &store).unwrap();
    assert_eq!(pending.missing(), [0]);
    pending.fill(0, &page).unwrap();
    let finished = decoder_.finish(&mut pending, &store).unwrap();
    assert!(finished.bytes == stream, "{}", hex(&finished.bytes));
    assert_eq!(
        store.stats().pages,
        1,
        "the fetched page is kept, the page of zeroes is not"
    );

    for (refused, error) in [
        (
            "37 72616d  16 01  21  14  55  13  28",
            DecodeError::Inconsistent,
        ), // a byte unused
        (
            "37 72616d  16 01  21  14  55  13  48",
            DecodeError::Inconsistent,
        ), // a byte too many
        (
            "37 72616d  16 01  21  14  55  23  38",
            DecodeError::Inconsistent,
        ), // an id too many
        (
            "37 72616d  16 01  21  14  55  38",
            DecodeError::Inconsistent,
        ), // an id unused
        (
            "37 72616d  16 01  31  14  55  13  38",
            DecodeError::Inconsistent,
        ), // too long
        (
            "37 72616d  16 01  11  14  55  13  38",
            DecodeError::Inconsistent,
        ), // too short
        ("37 72616d  36 01  21  14  55  13  38", DecodeError::Block), // block 1
        ("16 01  21  14  55  13  38", DecodeError::Block),            // no block at all
        ("07  16 01  21  14  55  13  38", DecodeError::Block),        // no name
        ("37 72616d  16 01  21  14  55  13  30", DecodeError::Program), // code 0
        ("37 72616d  16 01  21  14  55  13  3f", DecodeError::Program), // code 15
        ("37 72616d  16 01  21  14  55  1b  38", DecodeError::Place), // same, of nothing
        ("37 72616d  16 01  21  14  55  1c  38", DecodeError::Delta), // delta of "end"
        ("37 72616d  16 01  21  14  05  13  38", DecodeError::Program), // skip nothing
    ] {
        let payload = frame(refused, "656e64");
        let result = decoder(ChannelKind::QemuMain).begin(&payload, &store);
        assert_eq!(result.unwrap_err(), error, "{refused}");
    }
    for literals in ["656e", "656e6400"] {
        let payload = frame(program, literals);
        let result = decoder(ChannelKind::QemuMain).begin(&payload, &store);
        assert_eq!(result.unwrap_err(), DecodeError::Inconsistent, "{literals}");
    }
}

/// "Places" and "Deltas".
#[test]
fn same_and_delta() {
    let old = [0x5a; PAGE_SIZE];
    let mut new = old;
    (new[0], new[PAGE_SIZE - 1]) = (1, 4);
    let id = |page: &[u8]| *blake3::keyed_hash(&KEY, page).as_bytes();
    let head = bytes("0000000000000028");

    // new; seek back, same, seek back, delta
    let skeleton = [&head[..], &id(&old)].concat();
    let first = format!(
        "00 8820 {} 05 00 8020 37 72616d 12 {}",
        digest(&skeleton),
        hex(&old)
    );
    let skeleton = [&skeleton[..], &head, &id(&old), &head, &id(&new)].concat();
    let second = |program: &str, delta: &str| {
        let (program, delta) = (bytes(program), bytes(delta));
        let (digest, lengths) = (digest(&skeleton), [program.len(), delta.len()]);
        let [program_len, delta_len] = lengths.map(|length| format!("{length:02x}"));
        let (program, delta) = (hex(&program), hex(&delta));
        bytes(&format!(
            "00 9040 {digest} {program_len} 00 {delta_len} {program} {delta}"
        ))
    };
    let program = "0600 1b 0600 1c";
    let delta = "01 01 01  fc3f 01 04";

    let store = MemoryStore::new(1 << 20);
    let begun = |payload: &[u8]| {
        let mut decoder = decoder(ChannelKind::QemuMain);
        let mut pending = decoder.begin(&bytes(&first), &store).unwrap();
        decoder.finish(&mut pending, &store).unwrap();
        let pending = decoder.begin(payload, &store);
        (decoder, pending)
    };
    let (mut decoder, pending) = begun(&second(program, delta));
    let mut pending = pending.unwrap();
    assert!(pending.missing().is_empty());
    let finished = decoder.finish(&mut pending, &store).unwrap();
    assert!(finished.bytes == [&head[..], &old, &head, &new].concat());
    assert_eq!(
        (finished.stats.same_pages, finished.stats.delta_pages),
        (1, 1)
    );
    assert_eq!(store.stats().pages, 2, "the new page is kept");

    for (program, delta, error) in [
        (program, "01 01 01  fc3f 01", DecodeError::Delta), // cut off
        (program, "01 01 01  fe3f 01 04", DecodeError::Delta), // goes beyond the page
        (program, "01 01 01  fc3f 00", DecodeError::Delta), // empty run
        (
            program,
            "01 01 01  fc3f 01 04 00",
            DecodeError::Inconsistent,
        ), // a byte unused
        ("0600 1b 0601 1c", delta, DecodeError::Place),     // nothing at page 1
        ("0601 1b 0600 1c", delta, DecodeError::Place),
        ("0600 11 0600 1c", delta, DecodeError::Place), // no longer
        ("0600 14 0600 1c", delta, DecodeError::Place),
        ("0600 0b 0600 1c", delta, DecodeError::Program), // none
        ("0600 2b 0600 1c", delta, DecodeError::Place),
        ("0600 1b 0600 1c 0600 1b", delta, DecodeError::Inconsistent), // too long
    ] {
        let refused = begun(&second(program, delta)).1.unwrap_err();
        assert_eq!(refused, error, "{program} {delta}");
    }
}

/// "Program", operation 15: pages 2 and 3 are like page 1, and page 0 like page 3.
#[test]
fn similar_pages() {
    let store = MemoryStore::new(1 << 20);
    let old = [7; PAGE_SIZE];
    let mut new = old;
    (new[0], new[4095]) = (1, 4);
    let id = |page: &[u8; PAGE_SIZE]| *blake3::keyed_hash(&KEY, page).as_bytes();
    let heads = [1_u8, 2, 3, 0].map(|page| bytes(&format!("000000000000{page}028")));
    let stream = [
        [&heads[0][..], &old].concat(),
        [&heads[1][..], &new].concat(),
        [&heads[2][..], &new].concat(),
        [&heads[3][..], &old].concat(),
    ];
    let skeleton: Vec<u8> = (heads.iter().zip([&old, &new, &new, &old]))
        .flat_map(|(head, page)| [&head[..], &id(page)].concat())
        .collect();
    let (first, rest) = skeleton.split_at(40);
    let first = format!(
        "00 8820 {} 06 00 8020 37 72616d 15 12 {}",
        digest(first),
        hex(&old)
    );
    assert_eq!(rest.len(), 3 * 40);
    let second = |program: &str, deltas: &str| {
        let (program, deltas) = (bytes(program), bytes(deltas));
        let (digest, lengths) = (digest(&skeleton), [program.len(), deltas.len()]);
        let [program_len, delta_len] = lengths.map(|length| format!("{length:02x}"));
        let (program, deltas) = (hex(&program), hex(&deltas));
        bytes(&format!(
            "00 9860 {digest} {program_len} 00 {delta_len} {program} {deltas}"
        ))
    };
    let begun = |payload: &[u8]| {
        let mut decoder = decoder(ChannelKind::QemuMain);
        let mut pending = decoder.begin(&bytes(&first), &store).unwrap();
        decoder.finish(&mut pending, &store).unwrap();
        let pending = decoder.begin(payload, &store);
        (decoder, pending)
    };
    // Page 2 from one page back, which is page 1; page 3 by two; page 0 from three ahead, changed back.
    let deltas = "01 01 01 fc3f 01 04  01 01 01 fc3f 01 04  01 01 07 fc3f 01 07";
    let (mut decoder, pending) = begun(&second("1f 01 1f 03 0600 1f 06", deltas));
    let mut pending = pending.unwrap();
    // Page 3's contents come with this very frame, so the store has them later.
    assert_eq!(pending.missing(), [2]);
    pending.fill(2, &new).unwrap();
    let finished = decoder.finish(&mut pending, &store).unwrap();
    assert!(finished.bytes == stream[1..].concat());
    let stats = finished.stats;
    assert_eq!((stats.similar_pages, stats.similar_bytes), (3, 21));
    assert_eq!((stats.delta_pages, stats.batch_pages), (0, 0));
    for (program, error) in [
        ("1f 00 1f 03 0600 1f 06", DecodeError::Program), // itself
        ("0f 01 1f 03 0600 1f 06", DecodeError::Program), // none
        ("1f 03 1f 03 0600 1f 06", DecodeError::Place),   // page 0 holds nothing
        ("1f 02 1f 03 0600 1f 06", DecodeError::Place),   // nor does page 3
        (
            "1f ffffffffffffffffff01 1f 03 0600 1f 06",
            DecodeError::Place,
        ),
        ("1f 01 1f 02 0600 1f 06", DecodeError::Place), // nor does page 4
    ] {
        let refused = begun(&second(program, deltas)).1.unwrap_err();
        assert_eq!(refused, error, "{program}");
    }
}

/// "Manifests", and operation 14.
#[test]
fn manifests() {
    let page = [0x5a; PAGE_SIZE];
    let id = *blake3::keyed_hash(&KEY, &page).as_bytes();
    let head = bytes("0000000000003028"); // page 3
    let skeleton = digest(&[&head[..], &id].concat());
    let payload = |program: &str, literals: &[u8]| {
        let program = bytes(program);
        let (length, literal_len) = (
            program.len(),
            if literals.is_empty() { "00" } else { "8020" },
        );
        let literals = hex(literals);
        let program = hex(&program);
        bytes(&format!(
            "00 8820 {skeleton} {length:02x} 00 {literal_len} {program} {literals}"
        ))
    };
    let store = MemoryStore::new(1 << 20);
    let carried = |decoder: &mut ChannelDecoder, payload: &[u8]| {
        let mut pending = decoder.begin(payload, &store).unwrap();
        let finished = decoder.finish(&mut pending, &store).unwrap();
        assert!(finished.bytes == [&head[..], &page].concat());
    };

    // define "ram"; seek page 3; 1 new
    let mut first = decoder(ChannelKind::QemuMain);
    carried(&mut first, &payload("37 72616d 06 03 12", &page));
    let manifest = first.take_table().into_manifest().unwrap();
    // one block: its name, one chunk: number 0, 512 ids
    let mut canonical = bytes("01000000 03 72616d 01000000 0000000000000000");
    let mut ids = [[0; 16]; 512];
    ids[3].copy_from_slice(&id[..16]);
    canonical.extend_from_slice(ids.as_flattened());
    let key = blake3::derive_key("skyferry v1 manifest id key", &KEY);
    let expected = blake3::keyed_hash(&key, &canonical);
    assert_eq!(manifest.id().as_bytes()[..], expected.as_bytes()[..16]);

    // define "ram"; adopt; seek page 3; 1 same
    let manifest = std::sync::Arc::new(manifest);
    let mut second = decoder(ChannelKind::QemuMain);
    second.agree(manifest.clone());
    carried(&mut second, &payload("37 72616d 1e 06 03 1b", b""));
    // Only blocks that are defined take part; a channel of other bytes adopts nothing.
    for (program, kind, error) in [
        (
            "1e 37 72616d 06 03 1b",
            ChannelKind::QemuMain,
            DecodeError::Place,
        ),
        ("1e", ChannelKind::Opaque, DecodeError::Program),
    ] {
        let mut refusing = decoder(kind);
        refusing.agree(manifest.clone());
        let refused = refusing.begin(&payload(program, b""), &store);
        assert_eq!(refused.unwrap_err(), error, "{program}");
    }
}

/// A store whose segment 300 has the given ids from record 5 on.
struct Segment(MemoryStore, Vec<[u8; 16]>);

impl PageStore for Segment {
    fn get(&self, id: &ShortId, out: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        self.0.get(id, out)
    }
    fn put(&self, domain: &DomainId, id: &PageId, contents: &[u8]) {
        self.0.put(domain, id, contents);
    }
    fn records(
        &self,
        domain: &DomainId,
        segment: u32,
        first: u32,
        count: u32,
        out: &mut Vec<ShortId>,
    ) {
        assert_eq!(*domain, DomainKey::from_bytes(KEY).id());
        let ids = self.1.iter().skip(first.saturating_sub(5) as usize);
        if segment == 300 && first >= 5 {
            out.extend(ids.take(count as usize).map(|id| ShortId::from_bytes(*id)));
        }
    }
    fn contains(&self, id: &ShortId) -> bool {
        self.0.contains(id)
    }
    fn remove(&self, id: &ShortId) -> bool {
        self.0.remove(id)
    }
    fn stats(&self) -> StoreStats {
        self.0.stats()
    }
    fn capacity_pages(&self) -> u64 {
        self.0.capacity_pages()
    }
}

/// "Stored pages".
#[test]
fn stored_pages() {
    let pages = [[0x11; PAGE_SIZE], [0x22; PAGE_SIZE]];
    let id = |page: &[u8]| *blake3::keyed_hash(&KEY, page).as_bytes();
    let ids: Vec<[u8; 16]> = pages
        .iter()
        .map(|page| *id(page).first_chunk().unwrap())
        .collect();
    let check = ids.iter().fold(0x5bf0_3635_d1e8_95c3_u64, |check, id| {
        let word = u64::from_le_bytes(*id.last_chunk().unwrap());
        (check.rotate_left(7) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    let check = ((check >> 32) as u32).to_le_bytes();
    let heads = [
        bytes("0000000000000028"),
        bytes("0000000000001028"), // the next page
    ];
    let skeleton = [&heads[0][..], &id(&pages[0]), &heads[1], &id(&pages[1])].concat();
    let stream = [&heads[0][..], &pages[0], &heads[1], &pages[1]].concat();
    let frame = |run: &str| {
        let program = bytes(&format!("37 72616d {run}"));
        let (digest, length) = (digest(&skeleton), program.len());
        bytes(&format!(
            "00 9040 {digest} {length:02x} 00 00 {}",
            hex(&program)
        ))
    };
    let good = format!("2d ac02 05 {}", hex(&check));
    // Another segment, another record, another check: all is missing.
    let others = [
        format!("2d ad02 05 {}", hex(&check)),
        format!("2d ac02 06 {}", hex(&check)),
        "2d ac02 05 00000000".to_owned(),
    ];
    let store = Segment(MemoryStore::new(1 << 20), ids);
    for page in &pages {
        let hasher = Hasher::new(&DomainKey::from_bytes(KEY));
        store.put(hasher.domain(), &hasher.id(page), page);
    }
    for (run, missing) in [(&good, &[][..])]
        .into_iter()
        .chain(others.iter().map(|run| (run, &[0, 1][..])))
    {
        let mut decoder = decoder(ChannelKind::QemuMain);
        let mut pending = decoder.begin(&frame(run), &store).unwrap();
        assert_eq!(pending.missing(), missing, "{run}");
        for &index in missing {
            assert_eq!(pending.id(index), None);
            pending.fill(index, &pages[index as usize]).unwrap();
        }
        let finished = decoder.finish(&mut pending, &store).unwrap();
        assert!(finished.bytes == stream, "{run}");
    }
    for refused in [
        "0d ac02 05 00000000",
        "2d ac02 05 000000",
        "2d ac02 ffffff01 00000000",
    ] {
        let refusal = decoder(ChannelKind::QemuMain).begin(&frame(refused), &store);
        assert_eq!(refusal.unwrap_err(), DecodeError::Program, "{refused}");
    }
}

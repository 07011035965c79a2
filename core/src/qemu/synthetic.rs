//! Streams made up for tests and benchmarks, together with what a decoder should find in them.
//!
//! A stream follows from its builder's settings and seed alone. Its framing is that of QEMU 10.0;
//! guest memory is a seeded mixture of zero, repeated, compressible and incompressible pages, and
//! pages that change between rounds change in a few bytes, as real ones mostly do.

use super::wire::{FILE_HEADER, RAM_VERSION, command, flag, item};
use super::{CommitMark, Event, Phase};

/// Page size of made-up streams, in bytes.
pub const PAGE_SIZE: usize = 4096;
/// Section id of RAM.
const RAM: u32 = 2;
const DIRTY_BITMAP: u32 = 3;
const EARLY: u32 = 5;
/// Section id of the first device.
const DEVICE: u32 = 40;
/// Most records in a part of the RAM section.
const RECORDS_PER_PART: usize = 300;

/// A page record of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRecord {
    /// Position of its first byte in the stream.
    pub at: usize,
    /// Index into [`SyntheticStream::blocks`].
    pub block: usize,
    /// Byte offset inside the block.
    pub offset: u64,
    /// Whether it carries the block's name.
    pub named: bool,
    /// Whether it is a zero page; else `PAGE_SIZE` bytes of contents end the record.
    pub zero: bool,
    /// Length of the record in bytes.
    pub len: usize,
}

/// A stream and what is in it.
#[derive(Debug, Clone, Default)]
pub struct SyntheticStream {
    /// The bytes of the main channel.
    pub bytes: Vec<u8>,
    /// Block names, in the order of their ids.
    pub blocks: Vec<Vec<u8>>,
    /// Records that pieces can stand for, in order of the stream.
    pub records: Vec<PageRecord>,
    /// Events and the position in front of which each comes.
    pub events: Vec<(usize, Event)>,
    /// Position of the commit byte; `None` in postcopy, which commits with its package.
    pub commit: Option<usize>,
}

impl SyntheticStream {
    /// Settings for a stream; every default is in [`Builder::new`].
    #[must_use]
    pub fn builder() -> Builder {
        Builder::new()
    }
}

/// Settings of a stream.
#[derive(Debug, Clone)]
pub struct Builder {
    seed: u64,
    blocks: Vec<(Vec<u8>, u64)>,
    rounds: u32,
    dirty_percent: u64,
    zero_percent: u64,
    repeated_percent: u64,
    random_percent: u64,
    return_path: bool,
    xbzrle: bool,
    dirty_bitmap: bool,
    virtio_mem: bool,
    unknown_section: bool,
    multifd_flush: bool,
    switchover_start: bool,
    empty_parts: u32,
    device_bytes: usize,
    vmdesc: bool,
    postcopy: bool,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

/// Declares setters whose documentation is given.
macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $name(mut self, value: $type) -> Self {
            self.$name = value;
            self
        })*
    };
}

impl Builder {
    /// One block "pc.ram" of 64 pages and a ROM of 4, two rounds, a quarter dirtied per round, half
    /// of the pages zero, return path, device state of 20 KB, description at the end.
    #[must_use]
    pub fn new() -> Self {
        Self {
            seed: 1,
            blocks: vec![
                (b"pc.ram".to_vec(), 64),
                (b"/rom@etc/acpi/tables".to_vec(), 4),
            ],
            rounds: 2,
            dirty_percent: 25,
            zero_percent: 50,
            repeated_percent: 10,
            random_percent: 15,
            return_path: true,
            xbzrle: false,
            dirty_bitmap: false,
            virtio_mem: false,
            unknown_section: false,
            multifd_flush: false,
            switchover_start: true,
            empty_parts: 2,
            device_bytes: 20_000,
            vmdesc: true,
            postcopy: false,
        }
    }

    setters! {
        /// Everything random follows from this number.
        seed: u64;
        /// Passes over RAM, the last of them with the guest stopped; at least 1.
        rounds: u32;
        /// Share of the pages that change before each further round.
        dirty_percent: u64;
        /// Share of pages that are zero.
        zero_percent: u64;
        /// Share of pages that repeat one of 16 contents.
        repeated_percent: u64;
        /// Share of pages that no compressor can shrink; what is left is text.
        random_percent: u64;
        /// The source opens a return path.
        return_path: bool;
        /// Every third changed page is sent as an XBZRLE delta.
        xbzrle: bool;
        /// A dirty-bitmap section comes along.
        dirty_bitmap: bool;
        /// An early section of virtio-mem comes in front of the pages.
        virtio_mem: bool;
        /// A section of unknown layout comes in front of the pages.
        unknown_section: bool;
        /// RAM sections contain multifd sync marks.
        multifd_flush: bool;
        /// The switchover is announced by a command (machine types from 10.0 on).
        switchover_start: bool;
        /// Empty RAM sections in front of each round.
        empty_parts: u32;
        /// Bytes of device state, about.
        device_bytes: usize;
        /// A description follows the EOF mark.
        vmdesc: bool;
        /// The migration ends in postcopy.
        postcopy: bool;
    }

    /// Replaces the RAM blocks: name (1 to 255 bytes) and number of pages.
    #[must_use]
    pub fn blocks(mut self, blocks: &[(&str, u64)]) -> Self {
        self.blocks = blocks
            .iter()
            .map(|(name, pages)| (name.as_bytes().into(), *pages))
            .collect();
        self
    }

    /// Writes the stream.
    #[must_use]
    pub fn build(&self) -> SyntheticStream {
        let mut writer = Writer::new(self);
        writer.setup();
        for round in 0..self.rounds.saturating_sub(1) {
            for _ in 0..self.empty_parts {
                writer.ram_section(item::PART, |_| {});
            }
            writer.round(round, item::PART);
        }
        if self.postcopy {
            writer.end_postcopy()
        } else {
            writer.end_precopy()
        }
        writer.stream
    }
}

/// The stream under construction.
struct Writer<'a> {
    settings: &'a Builder,
    stream: SyntheticStream,
    random: u64,
    /// Block of the last record, and number of the last round announced with its last position.
    current: Option<usize>,
    round: u32,
    last: (usize, u64),
    counting_rounds: bool,
}

impl<'a> Writer<'a> {
    fn new(settings: &'a Builder) -> Self {
        Self {
            settings,
            stream: SyntheticStream::default(),
            random: settings.seed,
            current: None,
            round: 0,
            last: (0, 0),
            counting_rounds: true,
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.stream.bytes.extend_from_slice(bytes);
    }

    fn put_u8(&mut self, value: u8) {
        self.stream.bytes.push(value);
    }

    fn put_be16(&mut self, value: u16) {
        self.put(&value.to_be_bytes());
    }

    fn put_be32(&mut self, value: u32) {
        self.put(&value.to_be_bytes());
    }

    fn put_be64(&mut self, value: u64) {
        self.put(&value.to_be_bytes());
    }

    fn put_cstr(&mut self, string: &[u8]) {
        self.put_u8(u8::try_from(string.len()).expect("name of at most 255 bytes"));
        self.put(string);
    }

    fn put_command(&mut self, number: u16, data: &[u8]) {
        self.put_u8(item::COMMAND);
        self.put_be16(number);
        self.put_be16(u16::try_from(data.len()).expect("short command"));
        self.put(data);
    }

    fn put_head(&mut self, kind: u8, id: u32, idstr: &[u8], version: u32) {
        self.put_u8(kind);
        self.put_be32(id);
        self.put_cstr(idstr);
        self.put_be32(0);
        self.put_be32(version);
    }

    fn put_footer(&mut self, id: u32) {
        self.put_u8(item::FOOTER);
        self.put_be32(id);
    }

    fn tell(&mut self, event: Event) {
        self.stream.events.push((self.stream.bytes.len(), event));
    }

    /// The next pseudo-random number.
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.random)
    }

    fn setup(&mut self) {
        let settings = self.settings;
        self.tell(Event::Phase(Phase::Setup));
        self.put(&FILE_HEADER);
        self.put_u8(item::CONFIGURATION);
        let machine = b"pc-q35-10.0";
        self.put_be32(machine.len() as u32);
        self.put(machine);
        self.tell(Event::ReturnPath(settings.return_path));
        if settings.return_path {
            self.put_command(command::OPEN_RETURN_PATH, &[]);
            self.put_command(command::PING, &1_u32.to_be_bytes());
        }
        if settings.postcopy {
            let sizes = [
                (PAGE_SIZE as u64).to_be_bytes(),
                (PAGE_SIZE as u64).to_be_bytes(),
            ];
            self.put_command(command::POSTCOPY_ADVISE, sizes.as_flattened());
        }
        self.put_head(item::START, RAM, b"ram", RAM_VERSION);
        let page = PAGE_SIZE as u64;
        let total: u64 = settings.blocks.iter().map(|(_, pages)| pages * page).sum();
        self.put_be64(total | flag::MEM_SIZE);
        for (name, pages) in &settings.blocks {
            self.put_cstr(name);
            self.put_be64(pages * page);
        }
        self.end_ram_section();
        if settings.dirty_bitmap {
            self.put_head(item::START, DIRTY_BITMAP, b"dirty-bitmap", 1);
            self.put_u8(0x1C);
            self.put_cstr(b"drive0");
            self.put_cstr(b"backup");
            self.put_be32(65_536);
            self.put(&[1, 1]);
            self.put_footer(DIRTY_BITMAP);
        }
        if settings.virtio_mem {
            self.virtio_mem();
        }
        if settings.unknown_section {
            self.unknown_section();
        }
    }

    fn virtio_mem(&mut self) {
        const BLOCKS: u64 = 200;
        const BLOCK_SIZE: u64 = 2 << 20;
        self.put_head(
            item::FULL,
            EARLY,
            b"0000:00:03.0/virtio-mem-device-early",
            1,
        );
        self.put_be64(4 << 30);
        self.put_be64(BLOCKS * BLOCK_SIZE);
        self.put_be64(BLOCK_SIZE);
        self.put_be32(0);
        self.put_be64(64 << 20);
        for _ in 0..BLOCKS.div_ceil(64) {
            self.put_be64(0x7E00_0000_0500_0000);
        }
        self.put_footer(EARLY);
    }

    /// Random bytes with false footers in between.
    fn unknown_section(&mut self) {
        let id = EARLY + 1;
        self.tell(Event::Phase(Phase::Opaque));
        self.put_head(item::FULL, id, b"spapr/htab", 1);
        for index in 0..200 {
            let value = self.next();
            self.put_be64(value);
            if index % 50 == 7 {
                self.put_footer(id);
                self.put_u8(item::PART);
            }
        }
        self.put_footer(id);
        self.tell(Event::Phase(Phase::Setup));
    }

    fn ram_section(&mut self, kind: u8, body: impl FnOnce(&mut Self)) {
        if kind == item::END && self.counting_rounds {
            self.counting_rounds = false;
            self.tell(Event::Phase(Phase::Switchover));
        }
        self.put_u8(kind);
        self.put_be32(RAM);
        body(self);
        self.end_ram_section();
    }

    fn end_ram_section(&mut self) {
        if self.settings.multifd_flush {
            self.put_be64(flag::MULTIFD_FLUSH);
        }
        self.put_be64(flag::EOS);
        self.put_footer(RAM);
    }

    /// One pass over all blocks; with `kind` END the last section is the end of RAM.
    fn round(&mut self, round: u32, kind: u8) {
        let dirty: Vec<(usize, u64)> = (0..self.settings.blocks.len())
            .flat_map(|block| (0..self.settings.blocks[block].1).map(move |page| (block, page)))
            .filter(|(block, page)| {
                let chance = self.hash(*block, *page, u64::from(round) + 1000) % 100;
                round == 0 || chance < self.settings.dirty_percent
            })
            .collect();
        let mut parts = dirty.chunks(RECORDS_PER_PART).peekable();
        if parts.peek().is_none() && kind == item::END {
            self.ram_section(kind, |_| {});
        }
        while let Some(part) = parts.next() {
            let kind = if parts.peek().is_none() {
                kind
            } else {
                item::PART
            };
            self.ram_section(kind, |writer| {
                for (block, page) in part {
                    writer.record(*block, *page, round);
                }
            });
        }
    }

    /// A page record, of whatever type suits the page.
    fn record(&mut self, block: usize, page: u64, round: u32) {
        let offset = page * PAGE_SIZE as u64;
        let named = self.current != Some(block);
        self.current = Some(block);
        let zero = self.hash(block, page, 0) % 100 < self.settings.zero_percent && round == 0;
        let delta = self.settings.xbzrle && round > 0 && self.next().is_multiple_of(3);
        if self.counting_rounds && (self.round == 0 || (block, offset) < self.last) {
            self.round += 1;
            self.tell(Event::Phase(Phase::Precopy { round: self.round }));
        }
        let at = self.stream.bytes.len();
        let kind = if delta {
            flag::XBZRLE
        } else if zero {
            flag::ZERO
        } else {
            flag::PAGE
        };
        self.put_be64(offset | kind | if named { 0 } else { flag::CONTINUE });
        if named {
            let settings = self.settings;
            self.put_cstr(&settings.blocks[block].0);
        }
        self.last = (block, offset);
        if delta {
            self.put(&[1, 0, 7, 100, 5, 1, 2, 3, 4, 5]);
            return;
        }
        if zero {
            self.put_u8(0);
        } else {
            let contents = self.contents(block, page, round);
            self.put(&contents);
        }
        let name = &self.settings.blocks[block].0;
        let block = match self.stream.blocks.iter().position(|known| known == name) {
            Some(id) => id,
            None => {
                self.stream.blocks.push(name.clone());
                self.stream.blocks.len() - 1
            }
        };
        let len = self.stream.bytes.len() - at;
        self.stream.records.push(PageRecord {
            at,
            block,
            offset,
            named,
            zero,
            len,
        });
    }

    fn hash(&self, block: usize, page: u64, salt: u64) -> u64 {
        mix(mix(self.settings.seed ^ salt) ^ mix((block as u64) << 40 | page))
    }

    /// A page's contents in a round.
    fn contents(&self, block: usize, page: u64, round: u32) -> [u8; PAGE_SIZE] {
        const WORDS: [&[u8; 8]; 8] = [
            b"migrate ",
            b"\0\0\0\0\0\0\0\0",
            b"struct {",
            b"\x7fELF\x02\x01\x01\0",
            b"kernel: ",
            b"\0\0\0\x10\0\0\0\0",
            b"return 0",
            b"page 42;",
        ];
        let mut contents = [0; PAGE_SIZE];
        let mut state = self.hash(block, page, 1);
        let repeated = self.settings.repeated_percent;
        let kind = self.hash(block, page, 2) % 100;
        let random = (repeated..repeated + self.settings.random_percent).contains(&kind);
        if kind < repeated {
            state = mix(state % 16);
        }
        for chunk in contents.as_chunks_mut::<8>().0 {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let value = mix(state);
            *chunk = if random {
                value.to_le_bytes()
            } else {
                *WORDS[(value % 8) as usize]
            };
        }
        for change in 0..u64::from(round) {
            let place = self.hash(block, page, 3 + change) as usize % (PAGE_SIZE / 8);
            contents.as_chunks_mut::<8>().0[place] = change.to_le_bytes();
        }
        contents
    }

    fn switchover(&mut self) {
        if self.settings.switchover_start {
            self.counting_rounds = false;
            self.tell(Event::Phase(Phase::Switchover));
            self.put_command(command::SWITCHOVER_START, &[]);
        }
    }

    fn end_precopy(&mut self) {
        self.switchover();
        self.round(self.settings.rounds.saturating_sub(1), item::END);
        self.end_dirty_bitmap();
        self.tell(Event::Phase(Phase::DeviceState));
        self.devices();
        self.stream.commit = Some(self.stream.bytes.len());
        self.tell(Event::Commit(CommitMark::Candidate));
        self.put_u8(item::EOF);
        if self.settings.vmdesc {
            self.vmdesc();
            self.tell(Event::Commit(CommitMark::Complete));
            self.tell(Event::Phase(Phase::End));
        }
    }

    fn end_postcopy(&mut self) {
        self.switchover();
        if self.counting_rounds {
            self.counting_rounds = false;
            self.tell(Event::Phase(Phase::Switchover));
        }
        let name = self.settings.blocks[0].0.clone();
        let mut discard = vec![0, u8::try_from(name.len()).expect("short name")];
        discard.extend_from_slice(&name);
        discard.push(0);
        discard.extend_from_slice(&0_u64.to_be_bytes());
        discard.extend_from_slice(&(PAGE_SIZE as u64).to_be_bytes());
        self.put_command(command::POSTCOPY_RAM_DISCARD, &discard);
        self.put_command(command::PING, &2_u32.to_be_bytes());
        self.tell(Event::Commit(CommitMark::Candidate));
        let outer = std::mem::take(&mut self.stream.bytes);
        self.put_command(command::POSTCOPY_LISTEN, &[]);
        self.devices();
        self.put_command(command::PING, &3_u32.to_be_bytes());
        self.put_command(command::POSTCOPY_RUN, &[]);
        let package = std::mem::replace(&mut self.stream.bytes, outer);
        let len = u32::try_from(package.len()).expect("package below 4 GiB");
        self.put_command(command::PACKAGED, &len.to_be_bytes());
        self.put(&package);
        self.tell(Event::Commit(CommitMark::Complete));
        self.tell(Event::Phase(Phase::Postcopy));
        self.put_command(command::PING, &4_u32.to_be_bytes());
        self.current = None;
        self.round(self.settings.rounds.saturating_sub(1), item::END);
        self.end_dirty_bitmap();
        self.put_u8(item::EOF);
        self.tell(Event::Phase(Phase::End));
    }

    fn end_dirty_bitmap(&mut self) {
        if self.settings.dirty_bitmap {
            self.put_u8(item::END);
            self.put_be32(DIRTY_BITMAP);
            self.put_u8(0x40);
            self.put_be64(0);
            self.put_be32(1024);
            self.put_be64(16);
            self.put(&[
                0x7E, 0, 0, 0, 3, 0, 0, 6, 0, 0, 0, 4, b'{', b'"', b'"', b'}',
            ]);
            self.put_u8(0x42);
            self.put_be64(1024);
            self.put_be32(1024);
            self.put_u8(0x20);
            self.put_u8(0x01);
            self.put_footer(DIRTY_BITMAP);
        }
    }

    /// Sections of device state, sparse and random by turns.
    fn devices(&mut self) {
        const DEVICE_BYTES: usize = 700;
        let count = (self.settings.device_bytes / DEVICE_BYTES).max(1);
        for index in 0..count {
            let id = DEVICE + 3 * index as u32;
            self.put_head(item::FULL, id, format!("device-{index}").as_bytes(), 3);
            for word in 0..DEVICE_BYTES / 8 {
                let value = if (word + index) % 3 == 0 {
                    self.next()
                } else {
                    word as u64
                };
                self.put_be64(value);
            }
            self.put_footer(id);
        }
    }

    fn vmdesc(&mut self) {
        let mut json =
            String::from(r#"{"configuration": {"vmsd_name":"configuration","version":1},"#);
        json.push_str(r#""page_size": 4096, "devices": [{"name":"a \"]}\\","instance_id":0}"#);
        for index in 0..self.settings.device_bytes / 100 {
            json.push_str(&format!(
                r#", {{"name":"device-{index}","fields":[{{"size":8}}]}}"#
            ));
        }
        json.push_str("]}");
        self.put_u8(item::VMDESCRIPTION);
        self.put_be32(u32::try_from(json.len()).expect("short text"));
        self.put(json.as_bytes());
    }
}

/// A number that looks random and follows from `value` (splitmix64's finalizer).
fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ value >> 31
}

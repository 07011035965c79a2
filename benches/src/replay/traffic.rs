//! Who moves when, and what is in its pages.

use skyferry_dedup::{DomainKey, Hasher, PAGE_SIZE, ShortId};

use super::Plan;

/// Distinct contents that pages are cut from.
const POOL: usize = 8 << 20;
/// Percent of a guest's own pages that change between two of its moves.
const CHANGED_PERCENT: u64 = 20;
/// Percent of an image that a guest has in its memory.
const IMAGE_PERCENT: u64 = 75;
/// One of so many guests belongs to the tenant that is away for most of the day.
const AWAY: usize = 4;

/// What a page holds, told apart by where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The image that guests have in common.
    Shared,
    /// The guest itself.
    Own,
    /// A guest that is seen once.
    Once,
}

/// A page of a guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Content {
    pub(super) origin: Origin,
    /// No two contents have the same.
    pub(super) number: u64,
}

/// A tenant of the site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tenant {
    /// Its guests move all day.
    Busy,
    /// Its guests move in the first and the last quarter of the day only.
    Away,
}

struct Guest {
    tenant: Tenant,
    image: usize,
    /// How often each of its own pages has changed.
    versions: Vec<u16>,
}

/// The guests of a site. What they do depends on the plan alone, never on the store.
pub(super) struct Traffic {
    plan: Plan,
    seed: u64,
    guests: Vec<Guest>,
    /// Which edition of each image is in use.
    editions: Vec<u64>,
}

impl Traffic {
    pub(super) fn new(plan: &Plan) -> Self {
        let guest = |n: usize| Guest {
            tenant: if n % AWAY == AWAY - 1 {
                Tenant::Away
            } else {
                Tenant::Busy
            },
            image: n % plan.images,
            versions: vec![0; plan.own_pages as usize],
        };
        Self {
            plan: plan.clone(),
            // Zero would stay zero.
            seed: plan.seed | 1 << 63,
            guests: (0..plan.guests).map(guest).collect(),
            editions: vec![0; plan.images],
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % below
    }

    /// Lets time pass to move number `step` of the day; returns who moves. Steps are taken in order.
    pub(super) fn advance(&mut self, step: u32) -> usize {
        let plan = &self.plan;
        let hour = plan.hour_of(step);
        if step == plan.rollout_hour * plan.moves_per_hour {
            self.editions[0] += 1;
        }
        let away = (plan.hours / 4..plan.hours * 3 / 4).contains(&hour);
        let guests = self.guests.len() as u64;
        let guest = loop {
            // A quarter of the guests makes half of the moves.
            let among = if self.random(2) == 0 {
                guests.div_ceil(4)
            } else {
                guests
            };
            let guest = self.random(among) as usize;
            if !away || self.guests[guest].tenant == Tenant::Busy {
                break guest;
            }
        };
        for page in 0..self.guests[guest].versions.len() {
            if self.random(100) < CHANGED_PERCENT {
                self.guests[guest].versions[page] += 1;
            }
        }
        guest
    }

    pub(super) fn tenant(&self, guest: usize) -> Tenant {
        self.guests[guest].tenant
    }

    /// The pages of a guest as they are now.
    pub(super) fn pages(&self, guest: usize) -> impl Iterator<Item = Content> + use<> {
        let Guest {
            image, versions, ..
        } = &self.guests[guest];
        let edition = self.editions[*image] << 16 | *image as u64;
        let (whole, begin) = (self.plan.image_pages, guest as u64 * 37);
        let shared = (0..whole * IMAGE_PERCENT / 100).map(move |page| Content {
            origin: Origin::Shared,
            number: 1 << 60 | edition << 32 | ((begin + page) % whole),
        });
        let own = versions.clone().into_iter().enumerate();
        let own = own.map(move |(page, version)| Content {
            origin: Origin::Own,
            number: 2 << 60 | (guest as u64) << 48 | (page as u64) << 16 | u64::from(version),
        });
        shared.chain(own)
    }

    /// A guest that nobody has seen before nor will again.
    pub(super) fn once(&self) -> impl Iterator<Item = Content> + use<> {
        (0..self.plan.scan_pages).map(|page| Content {
            origin: Origin::Once,
            number: 3 << 60 | page,
        })
    }
}

/// Makes contents of numbers.
pub(super) struct Pages {
    pool: Vec<u8>,
    hashers: [Hasher; 2],
}

impl Pages {
    pub(super) fn new() -> Self {
        let mut pool = vec![0; POOL];
        blake3::Hasher::new().finalize_xof().fill(&mut pool);
        let hasher = |name| Hasher::new(&DomainKey::derive(b"replay", name));
        Self {
            pool,
            hashers: [hasher("busy"), hasher("away")],
        }
    }

    pub(super) fn hasher(&self, tenant: Tenant) -> &Hasher {
        &self.hashers[tenant as usize]
    }

    /// The id of a content: what names it is hashed in its stead, which a store cannot tell.
    pub(super) fn id(&self, tenant: Tenant, content: Content) -> skyferry_dedup::PageId {
        self.hasher(tenant).id(&content.number.to_le_bytes())
    }

    pub(super) fn short_id(&self, tenant: Tenant, content: Content) -> ShortId {
        self.id(tenant, content).short()
    }

    /// The content itself.
    pub(super) fn write(&self, content: Content, page: &mut [u8; PAGE_SIZE]) {
        let spread = content.number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let at = spread as usize % (POOL - PAGE_SIZE);
        page.copy_from_slice(&self.pool[at..at + PAGE_SIZE]);
        page[..8].copy_from_slice(&content.number.to_le_bytes());
    }
}

//! What a tile of [`super::tile`] asks for while it multiplies: panels that come next, or what is read once from memory.

use super::simd::Vector;
use super::tile::{Following, PANEL};

/// What to fetch while a tile is multiplied.
#[derive(Clone, Copy)]
pub(super) enum Ahead {
    /// Some cache lines, one behind the other, after every few units of K: a part of the panels that come next.
    Next { start: *const f32, lines: usize, every: usize },
    /// Of weights that are read once, what comes so many words behind; from unit `end` on `further` words more, which is behind all
    /// panels of the tile.
    Stream { distance: usize, end: usize, further: usize },
}

impl Ahead {
    /// Words of a line.
    pub(super) const LINE: usize = 16;
    /// Units between two times, where many groups of rows share what there is to fetch.
    pub(super) const EVERY: usize = 16;
    /// The same where less than [`Ahead::MANY`] tiles do. What is asked for in larger pieces fills the queue that the loads wait in:
    /// every 16 units gained nothing over none, every 4 units 12 % for a row of bf16 (base, AVX-512), 20 to 33 % for 4 rows and as
    /// much for 16. With many tiles, and one line at a time, it was 5 to 10 % slower than every 16.
    pub(super) const EVERY_FEW: usize = 4;
    pub(super) const MANY: usize = 4;
    /// How far ahead of a stream that is read once, in words; a panel alone under AVX-512's larger tiles takes twice that (8 rows of
    /// f32: 1.2 times as fast).
    pub(super) const DISTANCE: usize = 512;
    /// Units of a panel that is worth it with AVX-512: 32 KiB. Shorter ones belong to models that the caches hold, and lost 3 %.
    pub(super) const LEAST: usize = 256;
}

/// What the tiles of some strips fetch, apart from their turn: said once for all groups of rows that pass by, as it takes
/// divisions.
pub(super) struct Coming {
    /// For the first group, if it has nobody before it who brought its panels in.
    stream: Option<Ahead>,
    /// The panels that come next, and their lines.
    next: *const f32,
    all: usize,
    /// Tiles that have fetched before the first group.
    before: usize,
    /// Lines after every few units, and of a tile.
    lines: usize,
    every: usize,
    own: usize,
    /// Pieces that tiles fetch in turn, and words from one to the next.
    pieces: (usize, usize),
}

impl Coming {
    /// For `turns` groups of rows that pass by `n` strips from `strip` on, which begin at `from` and are `units` long; `streams`:
    /// whether it pays to fetch what is read once.
    #[inline(always)]
    pub(super) fn new<V: Vector>(
        strip: usize,
        n: usize,
        turns: usize,
        units: usize,
        from: *const f32,
        stride: usize,
        streams: bool,
    ) -> Self {
        let (width, column) = (2 * V::LANES, 2 * V::LANES * strip % PANEL);
        let panels = (n * width).div_ceil(PANEL);
        // With AVX2 a panel is a few strips, and the first one's tile fetches for all.
        let fresh = if V::LANES == 8 { panels == 1 && column == 0 && (turns == 1 || strip == 0) } else { turns == 1 };
        let stream = (streams && fresh).then(|| {
            let distance = if V::LANES > 8 && panels == 1 { 2 * Ahead::DISTANCE } else { Ahead::DISTANCE };
            let end = units.saturating_sub(distance / PANEL);
            Ahead::Stream { distance, end, further: (panels * stride).wrapping_sub(units * PANEL) }
        });
        let next = from.wrapping_sub(column).wrapping_add(panels * stride);
        let before = column / width * turns;
        if turns == 1 {
            return Coming { stream, next, all: 0, before, lines: 0, every: Ahead::EVERY, own: 0, pieces: (1, 0) };
        }
        // Tiles that share a panel: its strips, each as often as there are groups of rows. Each brings its part.
        let tiles = (PANEL / (n * width)).max(1) * turns;
        let all = panels * units * PANEL / Ahead::LINE;
        let every = if tiles < Ahead::MANY { Ahead::EVERY_FEW } else { Ahead::EVERY };
        let lines = (panels * PANEL / Ahead::LINE * every).div_ceil(tiles);
        Coming { stream, next, all, before, lines, every, own: units.div_ceil(every) * lines, pieces: (1, 0) }
    }

    /// Panels of [`Panels::following`], if it is time for them: as many as are multiplied, every other group for the same one.
    #[inline(always)]
    pub(super) fn instead<V: Vector>(
        self,
        following: Following,
        now: bool,
        strip: usize,
        n: usize,
        turns: usize,
        units: usize,
    ) -> Self {
        let (width, column) = (2 * V::LANES, 2 * V::LANES * strip % PANEL);
        let panels = (n * width).div_ceil(PANEL);
        let all = if now { following.words / Ahead::LINE } else { 0 };
        let (before, tiles) = (column / width * turns, (PANEL / (n * width)).max(1) * turns);
        let (every, times) = (Ahead::EVERY, units.div_ceil(Ahead::EVERY).max(1));
        let lines = all.div_ceil((tiles / panels).max(1) * times);
        let next = following.data.as_ptr().wrapping_add(strip * width / PANEL * following.stride);
        Coming { stream: None, next, all, before, lines, every, own: times * lines, pieces: (panels, following.stride) }
    }

    /// For the `turn`-th group.
    #[inline(always)]
    pub(super) fn ahead(&self, turn: usize) -> Ahead {
        if let (Some(stream), 0) = (self.stream, turn) {
            return stream;
        }
        let (tile, (pieces, apart)) = (self.before + turn, self.pieces);
        let (piece, from) = (tile % pieces, tile / pieces * self.own);
        let lines = if from < self.all { self.lines } else { 0 };
        Ahead::Next { start: self.next.wrapping_add(piece * apart + from * Ahead::LINE), lines, every: self.every }
    }
}

/// Levels of the cache, as x86-64 numbers their hints.
pub(super) const FIRST_LEVEL: i32 = 3;
pub(super) const SECOND_LEVEL: i32 = 2;

/// Asks for a cache line, into this level.
#[inline(always)]
pub(super) fn fetch<const LEVEL: i32>(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch reads nothing that a program could see: any address will do.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<LEVEL>(at.cast());
    }
    let _ = at;
}

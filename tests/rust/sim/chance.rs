//! Seeded chance: the same numbers from the same seed, on every machine.

/// `SplitMix64`.
#[derive(Clone, Debug)]
pub struct Chance(pub u64);

impl Chance {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn flip(&mut self) -> bool {
        self.next() >> 63 == 1
    }
}

/// How often: 1, or what the environment variable says, with which `make torture` runs longer.
pub fn times(variable: &str, usual: usize) -> usize {
    let set = std::env::var(variable).ok();
    set.map_or(usual, |times| times.parse().expect("a number"))
}

/// Runs `one` for each of `seeds`, on two threads; a panic names its seed.
pub fn for_seeds(seeds: std::ops::Range<usize>, one: impl Fn(u64) -> u64 + Sync) -> u64 {
    let next = std::sync::atomic::AtomicUsize::new(seeds.start);
    let (next, one) = (&next, &one);
    let work = move || {
        let mut sum = 0;
        loop {
            let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if seed >= seeds.end {
                return sum;
            }
            let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| one(seed as u64)));
            sum += ran.unwrap_or_else(|panic| {
                eprintln!("seed {seed}");
                std::panic::resume_unwind(panic)
            });
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let sum = work();
        sum + other.join().expect("its panic is above")
    })
}

//! F01, F03: power is lost behind every change of the disk, and again while that is recovered from.
//!
//! Run longer with `LOGRATIO_POWER_LOSSES=100`, which is how many times as many.

mod sim;

use sim::{
    SimDisk, State,
    chance::{Chance, for_seeds, times},
    life::Life,
};

const LIVES: usize = 650;
const STEPS: usize = 30;
/// Images of the disk behind each change.
const IMAGES: usize = 15;

/// What is written, sealed, compacted and merged, and the disk behind each change.
fn life(seed: u64) -> (Life, Vec<State>) {
    let mut life = Life::new(SimDisk::default(), seed);
    life.disk.record();
    life.steps(STEPS).expect("nothing fails");
    let history = life.disk.history();
    life.check_all();
    (life, history)
}

#[test]
fn a_loss_of_power_loses_nothing_that_was_acknowledged() {
    let lives = LIVES * times("LOGRATIO_POWER_LOSSES", 1);
    let images = for_seeds(0..lives, |seed| {
        let (life, history) = life(seed);
        let mut chance = Chance(!seed);
        for (at, state) in history.iter().enumerate() {
            for image in 0..IMAGES {
                let disk = SimDisk::after_power_loss(state, &mut chance);
                life.check(&disk, state.acknowledged);
                if image == at % (5 * IMAGES) {
                    recover(&life, disk, state, chance.next());
                }
            }
        }
        (history.len() * IMAGES) as u64
    });
    assert!(images >= 1_000_000, "only {images} images");
}

/// Opens, writes on, seals, merges, compacts; then nothing is lost or left behind.
fn recover(life: &Life, disk: SimDisk, state: &State, seed: u64) {
    let mut after = life.resume(disk, state.acknowledged, seed);
    after.check_all();
    after.recover();
    after.check_all();
    after.check_tidy();
}

/// Power goes, goes again during the recovery, and again during the recovery from that.
#[test]
fn losses_of_power_during_recovery_lose_nothing_either() {
    let seeds = 1_000 * times("LOGRATIO_POWER_LOSSES", 1);
    let images = for_seeds(1_000_000..1_000_000 + seeds, |seed| {
        let (first, history) = life(seed);
        let mut chance = Chance(!seed);
        let state = &history[chance.below(history.len())];
        let mut images = 0;
        let (second, history) = recovery(&first, state, &mut chance);
        for _ in 0..5 {
            let state = &history[chance.below(history.len())];
            let (third, history) = recovery(&second, state, &mut chance);
            for _ in 0..20 {
                let state = &history[chance.below(history.len())];
                let disk = SimDisk::after_power_loss(state, &mut chance);
                third.check(&disk, state.acknowledged);
                images += 1;
            }
        }
        images
    });
    assert!(images >= 100_000, "only {images} images");
}

/// A recovery from a loss of power in `state`, and the disk behind each of its changes.
fn recovery(before: &Life, state: &State, chance: &mut Chance) -> (Life, Vec<State>) {
    let disk = SimDisk::after_power_loss(state, chance);
    let mut after = before.resume(disk, state.acknowledged, chance.next());
    after.check_all();
    after.disk.record();
    after.recover();
    let history = after.disk.history();
    (after, history)
}

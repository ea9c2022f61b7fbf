//! Near-duplicates: what brute force finds, whatever the data and the number of threads.

mod sample;

use std::collections::HashSet;

use logratio::{
    group::NO_VALUES,
    similar::{Link, Request, near_duplicates},
    store::Store,
    token_counts::TokenCounts,
};
use proptest::{collection::vec, prelude::*};
use sample::{Completion, Sample, samples, store};

const WIDTH: usize = 3;

fn request(threshold: f64, threads: usize) -> Request {
    Request {
        threshold,
        shingle: WIDTH,
        threads,
    }
}

fn find(store: &Store, threshold: f64) -> Vec<Link> {
    near_duplicates(store, &request(threshold, 2)).expect("finds")
}

fn completion(ids: &[i32], role: u8) -> Completion {
    Completion {
        tokens: ids.iter().map(|&id| (id, 1)).collect(),
        role,
        values: NO_VALUES,
    }
}

/// A group's windows as they are, not as hashes.
fn shingles(sample: &Sample) -> HashSet<Vec<i32>> {
    let ids = sample.completions.iter().map(Completion::ids);
    let texts = std::iter::once(sample.prompt.clone()).chain(ids);
    let windows = |ids: Vec<i32>| -> Vec<Vec<i32>> {
        let width = WIDTH.min(ids.len());
        ids.windows(width).map(<[i32]>::to_vec).collect()
    };
    texts.flat_map(windows).collect()
}

fn jaccard(left: &HashSet<Vec<i32>>, right: &HashSet<Vec<i32>>) -> f64 {
    let real = |count: usize| f64::from(count as u32);
    real(left.intersection(right).count()) / real(left.union(right).count())
}

/// The same with ids below 50, but for one id in seven, which no vocabulary has.
fn in_a_vocabulary(mut sample: Sample) -> Sample {
    let known = |id: i32| if id % 7 == 0 { id | 1 << 30 } else { id % 50 };
    sample.prompt.iter_mut().for_each(|id| *id = known(*id));
    for completion in &mut sample.completions {
        completion
            .tokens
            .iter_mut()
            .for_each(|(id, _)| *id = known(*id));
    }
    sample
}

/// The smallest group of each group's cluster, from all pairs.
fn brute(samples: &[Sample], threshold: f64) -> Vec<usize> {
    let sets: Vec<_> = samples.iter().map(shingles).collect();
    let mut labels: Vec<usize> = (0..samples.len()).collect();
    for second in 0..samples.len() {
        for first in 0..second {
            if jaccard(&sets[first], &sets[second]) >= threshold {
                let (from, to) = (labels[first], labels[second]);
                let (low, high) = (from.min(to), from.max(to));
                labels
                    .iter_mut()
                    .filter(|label| **label == high)
                    .for_each(|label| *label = low);
            }
        }
    }
    labels
}

fn labels(groups: usize, links: &[Link]) -> Vec<usize> {
    let mut labels: Vec<usize> = (0..groups).collect();
    for link in links {
        labels[link.first as usize] = link.cluster as usize;
        labels[link.second as usize] = link.cluster as usize;
    }
    labels
}

/// Groups of `length` different tokens whose neighbours in a family share all but a few.
fn families(count: usize, length: i32) -> Vec<Sample> {
    let ids = |family: usize, member: usize, part: i32| -> Vec<i32> {
        let base = (family as i32 * 2 + part) * 1000;
        let changed = member as i32 * (length / 40).max(1) / 2;
        (0..length)
            .map(|at| {
                if at < changed {
                    base + 500 + at + 40 * member as i32
                } else {
                    base + at
                }
            })
            .collect()
    };
    (0..count)
        .map(|number| {
            let (family, member) = (number / 3, number % 3);
            Sample {
                prompt: ids(family, member, 0),
                completions: vec![
                    completion(&ids(family, member, 1), 0),
                    completion(&[7, family as i32], 1),
                ],
            }
        })
        .collect()
}

proptest! {
    #[test]
    fn no_link_is_wrong(samples in vec(vec(0..3i32, 1..6), 1..30), threshold in 0.4..1.0f64) {
        let samples: Vec<Sample> = samples
            .into_iter()
            .map(|prompt| Sample { completions: vec![completion(&prompt, 3)], prompt })
            .collect();
        let links = find(&store(&samples), threshold);
        for link in &links {
            let of = |group: u32| shingles(&samples[group as usize]);
            let exact = jaccard(&of(link.first), &of(link.second));
            prop_assert!(link.first < link.second);
            prop_assert!((f64::from(link.similarity) - exact).abs() < 1e-6);
            prop_assert!(exact >= threshold);
        }
        let found = labels(samples.len(), &links);
        let roots = (0..samples.len()).filter(|&group| found[group] == group).count();
        prop_assert_eq!(roots + links.len(), samples.len()); // a spanning forest
    }

    #[test]
    fn equal_groups_are_always_found(samples in samples(4), copies in 2..24usize) {
        let many: Vec<Sample> = samples.iter().cycle().take(samples.len() * copies).cloned().collect();
        let links = find(&store(&many), 1.0);
        prop_assert_eq!(labels(many.len(), &links), brute(&many, 1.0));
    }

    #[test]
    fn every_token_is_counted(samples in samples(12), threads in 1..4usize) {
        let samples: Vec<Sample> = samples.into_iter().map(in_a_vocabulary).collect();
        let counts = TokenCounts::of(&store(&samples), threads).expect("counts");
        let ids = |sample: &Sample| -> Vec<i32> {
            let completions = sample.completions.iter().flat_map(Completion::ids);
            sample.prompt.iter().copied().chain(completions).collect()
        };
        let all: Vec<i32> = samples.iter().flat_map(ids).collect();
        let beyond = all.iter().filter(|&&id| id >= 1 << 22).count() as u64;
        prop_assert_eq!(counts.uses.iter().sum::<u64>() + beyond, all.len() as u64);
        prop_assert_eq!(counts.beyond, beyond);
        for (id, &uses) in counts.uses.iter().enumerate().filter(|(_, uses)| **uses > 0) {
            prop_assert_eq!(uses, all.iter().filter(|&&other| other == id as i32).count() as u64);
        }
    }
}

#[test]
fn families_are_found_as_brute_force_finds_them() {
    let samples = families(300, 60);
    for threshold in [0.5, 0.8, 0.9] {
        let links = find(&store(&samples), threshold);
        let expected = brute(&samples, threshold);
        assert_eq!(
            labels(samples.len(), &links),
            expected,
            "threshold {threshold}"
        );
        assert!(!links.is_empty());
    }
}

#[test]
fn nothing_depends_on_the_number_of_threads() {
    let store = store(&families(301, 40));
    let one = near_duplicates(&store, &request(0.7, 1)).expect("finds");
    for threads in [2, 3, 7] {
        assert_eq!(
            near_duplicates(&store, &request(0.7, threads)).expect("finds"),
            one
        );
    }
}

#[test]
fn a_crowd_of_equal_prompts_is_bounded_and_its_twins_are_found() {
    // All share a long prompt, so all are candidates of one another; each has its own answer, and
    // every hundredth is the twin of its neighbour. All pairs would be 2·10^8 comparisons.
    let prompt: Vec<i32> = (0..60).collect();
    let samples: Vec<Sample> = (0..20_000)
        .map(|number| {
            let answer = (number - i32::from(number % 100 == 1)) * 50 + 1000;
            let ids: Vec<i32> = (answer..answer + 30).collect();
            Sample {
                prompt: prompt.clone(),
                completions: vec![completion(&ids, 3)],
            }
        })
        .collect();
    let links = find(&store(&samples), 0.9);
    assert!(
        links
            .iter()
            .all(|link| link.first + 1 == link.second && link.second % 100 == 1)
    );
    assert!(links.len() >= 190, "{} of 200 twins", links.len());
}

#[test]
fn a_million_windows_of_one_token_are_one() {
    let sample = |length: usize| Sample {
        prompt: vec![5; length],
        completions: vec![completion(&[5; 4], 0), completion(&[6; 4], 1)],
    };
    let links = find(&store(&[sample(1_000_000), sample(3)]), 1.0);
    assert_eq!(labels(2, &links), [0, 0]);
}

#[test]
fn whoever_is_chosen_groups_are_similar() {
    let pair = |roles: [u8; 2]| Sample {
        prompt: vec![1, 2, 3, 4],
        completions: vec![
            completion(&[5, 6, 7], roles[0]),
            completion(&[8, 9], roles[1]),
        ],
    };
    let links = find(&store(&[pair([0, 1]), pair([1, 0])]), 1.0);
    assert_eq!(links.len(), 1);
    assert_eq!(
        (links[0].first, links[0].second, links[0].similarity),
        (0, 1, 1.0)
    );
}

#[test]
fn an_empty_store_has_none() {
    assert!(find(&store(&[]), 0.8).is_empty());
    assert_eq!(
        TokenCounts::of(&store(&[]), 2).expect("counts"),
        TokenCounts::default()
    );
}

#[test]
fn counts_say_how_completions_begin_and_end() {
    let sample = |chosen: &[i32], rejected: &[i32]| Sample {
        prompt: vec![1],
        completions: vec![completion(chosen, 0), completion(rejected, 1)],
    };
    let single = Sample {
        prompt: vec![1],
        completions: vec![completion(&[2], 3)],
    };
    let samples = [
        sample(&[4, 5, 6], &[4, 5, 9]),
        sample(&[4, 9], &[5, 9]),
        single,
    ];
    let counts = TokenCounts::of(&store(&samples), 2).expect("counts");
    assert_eq!(
        (counts.compared, counts.same_start, counts.common),
        (2, 1, 2)
    );
    assert_eq!(counts.uses, [0, 3, 1, 0, 3, 3, 1, 0, 0, 3]);
    assert_eq!(counts.ends, [0, 0, 1, 0, 0, 0, 1, 0, 0, 3]);
}

#[test]
fn wrong_requests_are_refused() {
    let store = store(&families(3, 40));
    for (threshold, shingle, threads) in [
        (0.0, 3, 1),
        (1.1, 3, 1),
        (f64::NAN, 3, 1),
        (0.5, 0, 1),
        (0.5, 3, 0),
    ] {
        let request = Request {
            threshold,
            shingle,
            threads,
        };
        assert!(near_duplicates(&store, &request).is_err(), "{request:?}");
    }
}

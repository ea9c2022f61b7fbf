//! Every group once, in the same order on every machine, within the budget.
#![allow(clippy::cast_sign_loss, clippy::cast_precision_loss)] // counts and offsets

use logratio::{
    group::{Layout, Shape},
    plan::{Mixture, Order, Plan, Request, plan},
};
use proptest::{collection::vec, prelude::*};

fn request() -> Request<'static> {
    Request {
        seed: 7,
        ..Request::new(Order::LengthGrouped, 4, 100)
    }
}

/// `count` groups of lengths 1 to 97, in no order.
fn shapes(count: usize) -> Vec<Shape> {
    let length = |group: usize| 1 + (group * 7919 % 97) as u32;
    (0..count)
        .map(|group| Shape {
            tokens: length(group),
            rows: 2,
            longest: length(group),
            pairs: 0,
        })
        .collect()
}

fn any_shapes() -> impl Strategy<Value = Vec<Shape>> {
    let shape = (1usize..40, vec(1u32..40, 1..5));
    vec(
        shape.prop_map(|(prompt, completions)| Shape::new(prompt, completions.into_iter())),
        0..60,
    )
}

fn any_request() -> impl Strategy<Value = Request<'static>> {
    let order = prop_oneof![
        Just(Order::LengthGrouped),
        Just(Order::Shuffled),
        Just(Order::Sorted)
    ];
    let layout = prop_oneof![Just(Layout::Shared), Just(Layout::Padded)];
    (
        order,
        layout,
        any::<u64>(),
        0..9u64,
        1usize..12,
        1usize..300,
        1usize..6,
        prop_oneof![Just(0.0), Just(0.01)],
    )
        .prop_map(
            |(order, layout, seed, epoch, groups, budget, world_size, attention_cost)| Request {
                seed,
                epoch,
                layout,
                world_size,
                attention_cost,
                ..Request::new(order, groups, budget)
            },
        )
}

fn every_rank(shapes: &[Shape], request: Request<'_>) -> Vec<Plan> {
    (0..request.world_size)
        .map(|rank| plan(shapes, &Request { rank, ..request }).expect("plans"))
        .collect()
}

/// The micro-batches of each update.
fn updates(plan: &Plan) -> Vec<Vec<Vec<usize>>> {
    let micro = |at: usize| {
        let (start, end) = (
            plan.micro_offsets[at] as usize,
            plan.micro_offsets[at + 1] as usize,
        );
        plan.order[start..end]
            .iter()
            .map(|&group| group as usize)
            .collect()
    };
    plan.update_offsets
        .windows(2)
        .map(|pair| (pair[0] as usize..pair[1] as usize).map(micro).collect())
        .collect()
}

fn groups(update: &[Vec<usize>]) -> Vec<usize> {
    let mut groups = update.concat();
    groups.sort_unstable();
    groups
}

fn cost(shapes: &[Shape], layout: Layout, groups: &[usize]) -> usize {
    let shapes = || groups.iter().map(|&group| shapes[group]);
    match layout {
        Layout::Shared | Layout::Tree => shapes().map(|shape| shape.tokens as usize).sum(),
        Layout::Padded => {
            let rows: usize = shapes().map(|shape| shape.rows as usize).sum();
            rows * shapes().map(|shape| shape.longest).max().unwrap_or(0) as usize
        }
    }
}

/// Work of a group, written apart: tokens and the pairs that attend among them.
fn work(shape: Shape, request: &Request<'_>) -> f64 {
    let (rows, longest) = (f64::from(shape.rows), f64::from(shape.longest));
    let (tokens, pairs) = match request.layout {
        Layout::Shared | Layout::Tree => (f64::from(shape.tokens), shape.pairs as f64),
        Layout::Padded => (rows * longest, rows * longest * (longest + 1.0) / 2.0),
    };
    tokens + request.attention_cost * pairs
}

proptest! {
    #[test]
    fn every_group_comes_once_over_all_ranks(shapes in any_shapes(), request in any_request()) {
        let mut seen: Vec<i64> =
            every_rank(&shapes, request).into_iter().flat_map(|plan| plan.order).collect();
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..shapes.len() as i64).collect::<Vec<_>>());
    }

    #[test]
    fn offsets_cover_the_order(shapes in any_shapes(), request in any_request()) {
        for plan in every_rank(&shapes, request) {
            let micro = plan.micro_offsets;
            prop_assert_eq!(micro[0], 0);
            prop_assert_eq!(micro[micro.len() - 1], plan.order.len() as i64);
            prop_assert!(micro.windows(2).all(|pair| pair[0] < pair[1]), "an empty micro-batch");
            let update = plan.update_offsets;
            prop_assert_eq!(update[0], 0);
            prop_assert_eq!(update[update.len() - 1], micro.len() as i64 - 1);
            prop_assert_eq!(update.len() - 1, shapes.len().div_ceil(request.groups_per_update));
        }
    }

    #[test]
    fn updates_do_not_depend_on_the_number_of_ranks(shapes in any_shapes(), request in any_request()) {
        let alone = plan(&shapes, &Request { world_size: 1, ..request }).expect("plans");
        let ranks: Vec<_> = every_rank(&shapes, request).iter().map(updates).collect();
        for (number, update) in updates(&alone).iter().enumerate() {
            let together: Vec<Vec<usize>> =
                ranks.iter().flat_map(|updates| updates[number].clone()).collect();
            prop_assert_eq!(groups(update), groups(&together));
            let last = number + 1 == updates(&alone).len();
            prop_assert!(last || groups(update).len() == request.groups_per_update);
        }
    }

    #[test]
    fn only_a_lone_group_exceeds_the_budget(shapes in any_shapes(), request in any_request()) {
        for plan in every_rank(&shapes, request) {
            for micro in updates(&plan).concat() {
                let cost = cost(&shapes, request.layout, &micro);
                prop_assert!(micro.len() == 1 || cost <= request.token_budget, "{cost}");
            }
        }
    }

    #[test]
    fn ranks_differ_by_at_most_one_group_of_work(shapes in any_shapes(), request in any_request()) {
        let ranks: Vec<_> = every_rank(&shapes, request).iter().map(updates).collect();
        for number in 0..ranks[0].len() {
            let works = |updates: &Vec<Vec<Vec<usize>>>| -> Vec<f64> {
                let groups = updates[number].concat();
                groups.iter().map(|&group| work(shapes[group], &request)).collect()
            };
            let loads: Vec<f64> = ranks.iter().map(|rank| works(rank).iter().sum()).collect();
            let dearest = ranks.iter().flat_map(works).fold(0.0, f64::max);
            let least = loads.iter().copied().fold(f64::INFINITY, f64::min);
            let most = loads.iter().copied().fold(0.0, f64::max);
            prop_assert!(most - least <= dearest + 0.1, "{least} to {most}, the dearest {dearest}");
        }
    }

    #[test]
    fn no_rank_is_idle_where_there_are_groups_enough(shapes in any_shapes(), request in any_request()) {
        let ranks: Vec<_> = every_rank(&shapes, request).iter().map(updates).collect();
        for number in 0..ranks[0].len() {
            let busy = ranks.iter().filter(|updates| !updates[number].is_empty()).count();
            let groups: usize = ranks.iter().map(|updates| updates[number].concat().len()).sum();
            prop_assert_eq!(busy, groups.min(request.world_size));
            prop_assert!(!ranks[0][number].is_empty(), "rank 0 always has work");
        }
    }

    #[test]
    fn a_group_left_in_a_later_micro_batch_fits_in_no_earlier_one(
        shapes in any_shapes(), request in any_request()
    ) {
        let request = Request { layout: Layout::Shared, ..request };
        for update in updates(&plan(&shapes, &request).expect("plans")) {
            for (number, micro) in update.iter().enumerate() {
                let first = cost(&shapes, Layout::Shared, &micro[..1]);
                for earlier in &update[..number] {
                    // What was in it when this one was begun: nothing shorter than its first group.
                    let before: Vec<usize> = earlier
                        .iter()
                        .copied()
                        .filter(|&group| cost(&shapes, Layout::Shared, &[group]) >= first)
                        .collect();
                    let full = cost(&shapes, Layout::Shared, &before) + first;
                    prop_assert!(full > request.token_budget, "{full} would have fitted");
                }
            }
        }
    }

    #[test]
    fn same_seed_same_plan(shapes in any_shapes(), request in any_request()) {
        prop_assert_eq!(plan(&shapes, &request).expect("plans"), plan(&shapes, &request).expect("plans"));
    }
}

/// A resumed run must meet the same order on any machine, with any later release. The numbers come
/// from the planner written apart in `plan_oracle.py`.
#[test]
fn the_order_is_golden() {
    let order = |order| {
        plan(&shapes(12), &Request { order, ..request() })
            .expect("plans")
            .order
    };
    assert_eq!(order(Order::Sorted), [3, 6, 9, 1, 4, 10, 7, 2, 5, 8, 11, 0]);
    assert_eq!(
        order(Order::Shuffled),
        [1, 4, 10, 7, 3, 6, 8, 11, 9, 5, 0, 2]
    );
    assert_eq!(
        order(Order::LengthGrouped),
        [5, 8, 11, 0, 3, 6, 9, 1, 4, 10, 7, 2]
    );
}

fn any_mixture() -> impl Strategy<Value = (Vec<f64>, Vec<u32>)> {
    (1usize..5).prop_flat_map(|datasets| {
        let weights = vec(prop_oneof![Just(0.0), 0.01..9.0f64], datasets);
        (weights, vec(0..datasets as u32, 1..40)).prop_map(|(mut weights, dataset_of)| {
            for (dataset, weight) in weights.iter_mut().enumerate() {
                if !dataset_of.contains(&(dataset as u32)) {
                    *weight = 0.0;
                }
            }
            weights[dataset_of[0] as usize] += 1.0;
            (weights, dataset_of)
        })
    })
}

proptest! {
    #[test]
    fn datasets_give_their_share_and_use_their_groups_alike(
        (weights, dataset_of) in any_mixture(), request in any_request()
    ) {
        let shapes = shapes(dataset_of.len());
        let mixture = Mixture { weights: &weights, dataset_of: &dataset_of };
        let mut used = vec![0usize; shapes.len()];
        for epoch in 0..7 {
            let request = Request { mixture: Some(mixture), epoch, ..request };
            let ranks = every_rank(&shapes, request);
            let drawn: Vec<usize> =
                ranks.iter().flat_map(|plan| plan.order.iter().map(|&group| group as usize)).collect();
            prop_assert_eq!(drawn.len(), shapes.len());
            let total: f64 = weights.iter().sum();
            for (dataset, weight) in weights.iter().enumerate() {
                let given =
                    drawn.iter().filter(|&&group| dataset_of[group] as usize == dataset).count();
                let share = shapes.len() as f64 * weight / total;
                prop_assert!((given as f64 - share).abs() < 1.0 + 1e-9, "{given} of {share}");
            }
            for group in drawn {
                used[group] += 1;
            }
            for dataset in 0..weights.len() {
                let uses = used.iter().zip(&dataset_of).filter(|(_, of)| **of as usize == dataset);
                let uses: Vec<usize> = uses.map(|(&count, _)| count).collect();
                let (least, most) = (uses.iter().min(), uses.iter().max());
                prop_assert!(most.unwrap_or(&0) - least.unwrap_or(&0) <= 1, "{uses:?}");
            }
        }
    }
}

#[test]
fn an_impossible_mixture_is_refused() {
    let refusal = |weights: &[f64], dataset_of: &[u32]| {
        let mixture = Some(Mixture {
            weights,
            dataset_of,
        });
        plan(
            &shapes(3),
            &Request {
                mixture,
                ..request()
            },
        )
        .expect_err("refused")
        .to_string()
    };
    assert_eq!(
        refusal(&[1.0, -1.0], &[0, 0, 1]),
        "weights must be at least 0 and not all 0: [1.0, -1.0]"
    );
    assert!(refusal(&[0.0], &[0, 0, 0]).contains("not all 0"));
    assert!(refusal(&[f64::NAN], &[0, 0, 0]).contains("NaN"));
    assert_eq!(
        refusal(&[1.0], &[0, 0, 1]),
        "dataset 1 has no weight: there are 1"
    );
    assert_eq!(
        refusal(&[1.0], &[0]),
        "datasets are given for 1 groups, but there are 3"
    );
    assert_eq!(
        refusal(&[1.0, 0.5], &[0, 0, 0]),
        "dataset 1 has weight 0.5 and no group"
    );
}

#[test]
fn seed_and_epoch_change_the_order() {
    let order = |seed, epoch| {
        plan(
            &shapes(500),
            &Request {
                seed,
                epoch,
                ..request()
            },
        )
        .expect("plans")
        .order
    };
    assert_ne!(order(0, 0), order(0, 1));
    assert_ne!(order(0, 0), order(1, 0));
    assert_ne!(order(0, 1), order(1, 0));
}

fn spread(order: Order) -> f64 {
    let shapes = shapes(2000);
    let plan = plan(&shapes, &Request { order, ..request() }).expect("plans");
    let spreads: Vec<f64> = updates(&plan)
        .iter()
        .map(|update| {
            let lengths: Vec<u32> = groups(update)
                .iter()
                .map(|&group| shapes[group].tokens)
                .collect();
            let (least, most) = (lengths.iter().min(), lengths.iter().max());
            f64::from(most.expect("a group") - least.expect("a group"))
        })
        .collect();
    spreads.iter().sum::<f64>() / spreads.len() as f64
}

#[test]
fn length_grouped_updates_hold_similar_lengths_in_random_order() {
    assert!(spread(Order::LengthGrouped) < spread(Order::Shuffled) / 10.0);
    let shapes = shapes(2000);
    let plan = plan(&shapes, &request()).expect("plans");
    let longest: Vec<u32> = updates(&plan)
        .iter()
        .map(|update| shapes[update[0][0]].tokens)
        .collect();
    let falls = longest.windows(2).filter(|pair| pair[0] > pair[1]).count();
    assert!(
        (150..350).contains(&falls),
        "{falls} of 499 updates are shorter than the one before"
    );
}

#[test]
fn sorted_is_longest_first_over_the_epoch() {
    let shapes = shapes(100);
    let plan = plan(
        &shapes,
        &Request {
            order: Order::Sorted,
            token_budget: 1,
            ..request()
        },
    )
    .expect("plans");
    let lengths: Vec<u32> = plan
        .order
        .iter()
        .map(|&group| shapes[group as usize].tokens)
        .collect();
    assert!(lengths.windows(2).all(|pair| pair[0] >= pair[1]));
}

#[test]
fn an_impossible_request_is_refused() {
    let refused = |request: Request<'_>| plan(&shapes(3), &request).is_err();
    assert!(refused(Request {
        groups_per_update: 0,
        ..request()
    }));
    assert!(refused(Request {
        token_budget: 0,
        ..request()
    }));
    assert!(refused(Request {
        rank: 1,
        ..request()
    }));
    assert!(refused(Request {
        world_size: 0,
        ..request()
    }));
    for attention_cost in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(refused(Request {
            attention_cost,
            ..request()
        }));
    }
    assert!("random".parse::<Order>().is_err());
    assert!("packed".parse::<Layout>().is_err());
}

#[test]
fn no_group_is_no_update() {
    let plan = plan(&[], &request()).expect("plans");
    assert_eq!(
        (plan.order, plan.micro_offsets, plan.update_offsets),
        (vec![], vec![0], vec![0])
    );
}

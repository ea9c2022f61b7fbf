//! Every group once, in the same order on every machine, within the budget.
#![allow(clippy::cast_sign_loss, clippy::cast_precision_loss)] // counts and offsets

use logratio::plan::{Layout, Order, Plan, Request, Shape, plan};
use proptest::{collection::vec, prelude::*};

fn request() -> Request {
    Request {
        order: Order::LengthGrouped,
        seed: 7,
        epoch: 0,
        groups_per_update: 4,
        token_budget: 100,
        layout: Layout::Shared,
        rank: 0,
        world_size: 1,
    }
}

/// `count` groups of lengths 1 to 97, in no order.
fn shapes(count: usize) -> Vec<Shape> {
    let shape = |group: usize| 1 + group * 7919 % 97;
    (0..count)
        .map(|group| Shape {
            tokens: shape(group),
            rows: 2,
            longest: shape(group),
        })
        .collect()
}

fn any_shapes() -> impl Strategy<Value = Vec<Shape>> {
    let shape = (1usize..40, 1usize..40, 1usize..5);
    vec(
        shape.prop_map(|(prompt, longest, rows)| Shape {
            tokens: prompt + longest + (rows - 1),
            rows,
            longest: prompt + longest,
        }),
        0..60,
    )
}

fn any_request() -> impl Strategy<Value = Request> {
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
    )
        .prop_map(
            |(order, layout, seed, epoch, groups_per_update, token_budget, world_size)| Request {
                order,
                seed,
                epoch,
                groups_per_update,
                token_budget,
                layout,
                rank: 0,
                world_size,
            },
        )
}

fn every_rank(shapes: &[Shape], request: Request) -> Vec<Plan> {
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
        Layout::Shared => shapes().map(|shape| shape.tokens).sum(),
        Layout::Padded => {
            let rows: usize = shapes().map(|shape| shape.rows).sum();
            rows * shapes().map(|shape| shape.longest).max().unwrap_or(0)
        }
    }
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
            let of_rank = |updates: &Vec<Vec<Vec<usize>>>| -> usize {
                let each = updates[number].concat();
                each.iter().map(|&group| cost(&shapes, request.layout, &[group])).sum()
            };
            let loads: Vec<usize> = ranks.iter().map(of_rank).collect();
            let dearest = ranks
                .iter()
                .flat_map(|updates| updates[number].concat())
                .map(|group| cost(&shapes, request.layout, &[group]))
                .max()
                .unwrap_or(0);
            let (least, most) = (loads.iter().min().expect("a rank"), loads.iter().max().expect("a rank"));
            prop_assert!(most - least <= dearest);
        }
    }

    #[test]
    fn same_seed_same_plan(shapes in any_shapes(), request in any_request()) {
        prop_assert_eq!(plan(&shapes, &request).expect("plans"), plan(&shapes, &request).expect("plans"));
    }
}

/// A resumed run must meet the same order on any machine, with any later release. The numbers come
/// from an independent `ChaCha8` and shuffle in Python.
#[test]
fn the_order_is_golden() {
    let order = |order| {
        plan(&shapes(12), &Request { order, ..request() })
            .expect("plans")
            .order
    };
    assert_eq!(order(Order::Sorted), [3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, 0]);
    assert_eq!(
        order(Order::Shuffled),
        [1, 4, 7, 10, 3, 6, 8, 11, 9, 2, 5, 0]
    );
    assert_eq!(
        order(Order::LengthGrouped),
        [5, 8, 11, 0, 3, 6, 9, 1, 4, 7, 10, 2]
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
            let lengths: Vec<usize> = groups(update)
                .iter()
                .map(|&group| shapes[group].tokens)
                .collect();
            let (least, most) = (lengths.iter().min(), lengths.iter().max());
            (most.expect("a group") - least.expect("a group")) as f64
        })
        .collect();
    spreads.iter().sum::<f64>() / spreads.len() as f64
}

#[test]
fn length_grouped_updates_hold_similar_lengths_in_random_order() {
    assert!(spread(Order::LengthGrouped) < spread(Order::Shuffled) / 10.0);
    let shapes = shapes(2000);
    let plan = plan(&shapes, &request()).expect("plans");
    let longest: Vec<usize> = updates(&plan)
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
            ..request()
        },
    )
    .expect("plans");
    let lengths: Vec<usize> = plan
        .order
        .iter()
        .map(|&group| shapes[group as usize].tokens)
        .collect();
    assert!(lengths.windows(2).all(|pair| pair[0] >= pair[1]));
}

#[test]
fn an_impossible_request_is_refused() {
    let refused = |request: Request| plan(&shapes(3), &request).is_err();
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

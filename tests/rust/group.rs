//! A group that breaks a rule is refused, and the writer goes on as if it had never been.

use logratio::{Error, group::Group, store::StoreWriter};

fn refusal(change: impl FnOnce(&mut Group<'_>)) -> String {
    let mut group = Group {
        prompt_ids: &[1, 2],
        completion_ids: &[3, 4, 5],
        completion_mask: &[1, 0, 1],
        completion_lengths: &[1, 2],
        roles: &[0, 1],
        values: &[],
        file: 0,
        line: 1,
    };
    change(&mut group);
    let mut writer = StoreWriter::in_memory();
    let error = writer.push(&group).expect_err("refused");
    assert!(matches!(error, Error::Invalid(_)));
    assert!(writer.finish("{}").expect("still usable").is_empty());
    error.to_string()
}

#[test]
fn a_bad_group_is_refused_with_its_reason() {
    assert_eq!(
        refusal(|group| group.prompt_ids = &[]),
        "the prompt is empty"
    );
    assert_eq!(
        refusal(|group| group.completion_lengths = &[]),
        "the group has no completion"
    );
    assert_eq!(
        refusal(|group| group.completion_lengths = &[3, 0]),
        "completion 1 is empty"
    );
    assert!(refusal(|group| group.completion_lengths = &[1, 1]).contains("add up to 2"));
    assert!(refusal(|group| group.completion_mask = &[1]).contains("1 mask values"));
    assert!(refusal(|group| group.roles = &[0]).contains("1 roles for 2"));
    assert!(refusal(|group| group.prompt_ids = &[-1]).contains("-1 is negative"));
    assert!(refusal(|group| group.completion_ids = &[1, 2, -7]).contains("-7 is negative"));
    assert!(refusal(|group| group.roles = &[0, 5]).contains("role 5"));
    assert_eq!(
        refusal(|group| group.values = &[[0.0; 4]]),
        "values of 1 completions, but there are 2"
    );
    assert_eq!(
        refusal(|group| group.values = &[[0.0; 4], [0.0, 0.0, 0.0, f32::NEG_INFINITY]]),
        "the weight of completion 1 is infinite"
    );
}

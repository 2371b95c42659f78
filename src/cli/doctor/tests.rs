//! The checks on a Spark that is in order and on ones that are not. The machines are recordings in the form of `--record`; they
//! were put together from what is known of Sparks, not taken from one.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    examine,
    host::{Host, Recorded, Recording, ThisHost},
    report::{Check, Status},
};

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/doctor/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A Spark with everything in `change` (by kind and name) instead of what it has.
fn spark_with(change: &Value) -> Recorded {
    let mut machine = fixture("spark");
    for (kind, entries) in change.as_object().unwrap() {
        for (name, value) in entries.as_object().unwrap() {
            machine[kind][name] = value.clone();
        }
    }
    Recorded::new(machine)
}

/// What did not pass.
fn troubles(host: &dyn Host) -> BTreeMap<String, String> {
    let (checks, _) = examine(host);
    let bad = checks.into_iter().filter(|check| check.status != Status::Pass);
    bad.map(|check| (check.id, check.status.to_string())).collect()
}

#[test]
fn a_spark_in_order_passes_everything() {
    let (checks, facts) = examine(&Recorded::new(fixture("spark")));
    let bad: Vec<&Check> = checks.iter().filter(|check| check.status != Status::Pass).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(checks.len(), 28);
    assert_eq!(facts["rails"][0]["subnet"], "192.168.101.0/24");
    assert_eq!(facts["driver"], "580.126.09");
}

#[test]
fn each_fault_is_named_and_nothing_else() {
    let cases = fixture("broken");
    assert!(cases.as_array().unwrap().len() >= 8);
    for case in cases.as_array().unwrap() {
        let expects: BTreeMap<String, String> = serde_json::from_value(case["expects"].clone()).unwrap();
        assert_eq!(troubles(&spark_with(&case["change"])), expects, "{}", case["name"]);
    }
}

#[test]
fn whatever_is_not_fine_says_what_to_do() {
    for case in fixture("broken").as_array().unwrap() {
        let (checks, _) = examine(&spark_with(&case["change"]));
        for check in checks.iter().filter(|check| check.status != Status::Pass) {
            assert!(!check.advice.is_empty() && !check.found.is_empty(), "{check:?}");
        }
    }
}

#[test]
fn a_machine_without_a_gpu_gets_fifteen_checks_and_a_recording_repeats_them() {
    let host = Recording::new(ThisHost);
    let (checks, _) = examine(&host);
    let mut ids: Vec<&str> = checks.iter().map(|check| check.id.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert!(ids.len() >= 15, "{ids:?}");
    let (again, _) = examine(&Recorded::new(host.into_json()));
    let what =
        |checks: &[Check]| checks.iter().map(|check| (check.id.clone(), check.status)).collect::<Vec<_>>();
    assert_eq!(what(&again), what(&checks), "a recording is looked at as the machine was");
}

#[test]
fn an_empty_machine_is_no_panic() {
    let (checks, _) = examine(&Recorded::new(Value::Null));
    assert!(!checks.is_empty());
}

#[test]
fn checks_survive_the_way_over_ssh() {
    for check in [
        Check::pass("A.B", "fine"),
        Check::warn("A.C", "so so", "do this"),
        Check::fail("A.D", "bad", "do that").with_fix("sudo x"),
    ] {
        assert_eq!(Check::from_json(&check.to_json()), Some(check));
    }
    assert_eq!(Check::from_json(&Value::Null), None);
}

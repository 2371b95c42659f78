//! Files that lie: each is an error that names what is wrong, none a panic or a large allocation.

use std::path::Path;

use proptest::prelude::*;
use spark_backend::Rank;

use super::files::{f32s, file, folder, open, with_header};
use crate::header::parse_header;
use crate::{Error, LoadOptions, LoadStrategy, ParamSpec, Shard};

fn parse(bytes: &[u8]) -> Result<usize, Error> {
    parse_header(Path::new("shard"), &mut &bytes[..], bytes.len() as u64).map(|tensors| tensors.len())
}

/// A file whose header has these entries (JSON), with `data` zero bytes.
fn entries(json: &str, data: usize) -> Vec<u8> {
    with_header(&format!("{{{json}}}"), &vec![0; data])
}

fn entry(name: &str, dtype: &str, shape: &str, begin: &str, end: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

#[test]
fn a_good_file_is_good() {
    assert_eq!(parse(&file(&[f32s("a", &[2], &[1.0, 2.0]), f32s("b", &[], &[3.0])])).unwrap(), 2);
    assert_eq!(parse(&entries("", 0)).unwrap(), 0);
}

#[test]
fn header_lengths() {
    for length in [u64::MAX, 1 << 63, 1 << 40, 9] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        assert!(matches!(parse(&bytes), Err(Error::Header { .. })), "{length}");
    }
    for len in 0..8 {
        assert!(matches!(parse(&vec![0; len]), Err(Error::Header { .. })));
    }
    // Above the cap, in a (sparse) file that would be large enough.
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), (200_000_000_u64).to_le_bytes()).unwrap();
    path.as_file().set_len(1 << 30).unwrap();
    let Err(Error::Header { reason, .. }) = crate::header::read_header(path.path()) else {
        panic!("accepted")
    };
    assert!(reason.contains("limit"), "{reason}");
}

#[test]
fn lying_entries_are_named_with_offset() {
    let cases = [
        ("size", entry("t", "F32", "[3]", "0", "8"), 8),
        ("overflow", entry("t", "F32", "[4294967296,4294967296,4294967296]", "0", "8"), 8),
        ("wraps to 8", entry("t", "F32", "[2,9223372036854775809]", "0", "8"), 8),
        ("outside", entry("t", "F32", "[2]", "0", "8"), 4),
        ("far outside", entry("t", "U8", "[1]", "18446744073709551614", "18446744073709551615"), 4),
        ("reversed", entry("t", "F32", "[2]", "8", "0"), 8),
        ("dtype", entry("t", "F7", "[2]", "0", "8"), 8),
        ("dimensions", entry("t", "U8", "[1,1,1,1,1,1,1,1,1]", "0", "1"), 1),
        (
            "overlap",
            format!("{},{}", entry("a", "U8", "[4]", "0", "4"), entry("t", "U8", "[4]", "2", "6")),
            6,
        ),
        ("hole", format!("{},{}", entry("a", "U8", "[2]", "0", "2"), entry("t", "U8", "[2]", "4", "6")), 6),
        ("hole before the first", entry("t", "U8", "[2]", "2", "4"), 4),
    ];
    for (what, json, data) in cases {
        let result = parse(&entries(&json, data));
        assert!(matches!(&result, Err(Error::Tensor { tensor, .. }) if tensor == "t"), "{what}: {result:?}");
    }
    assert!(matches!(parse(&entries(&entry("t", "U8", "[2]", "0", "2"), 5)), Err(Error::Header { .. })));
}

#[test]
fn json_that_is_not_a_header() {
    let twice = format!("{},{}", entry("t", "U8", "[1]", "0", "1"), entry("t", "U8", "[1]", "0", "1"));
    let deep = format!(r#""t":{}{}"#, "[".repeat(100_000), "]".repeat(100_000));
    let metadata = format!(r#""__metadata__":{}1{}"#, r#"{"a":"#.repeat(5000), "}".repeat(5000));
    let others = [
        twice.as_str(),
        &deep,
        &metadata,
        r#""t":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}"#,
        r#""t":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}"#,
        r#""t":{"dtype":"U8","shape":[1],"data_offsets":[0]}"#,
        r#""t":{"dtype":"U8","shape":[1]}"#,
        r#""t":7"#,
        "\u{0}",
    ];
    for json in others {
        assert!(
            matches!(parse(&entries(json, 1)), Err(Error::Json { .. })),
            "{}",
            &json[..json.len().min(60)]
        );
    }
    assert!(matches!(parse(&with_header("[]", &[])), Err(Error::Json { .. })));
    assert!(matches!(parse(&with_header("\u{fffd}", &[])), Err(Error::Json { .. })));
}

#[test]
fn truncated_shard_at_every_length() {
    let whole = file(&[f32s("a", &[2], &[1.0, 2.0]), f32s("b", &[1], &[3.0])]);
    for len in 0..whole.len() {
        assert!(parse(&whole[..len]).is_err(), "{len} of {}", whole.len());
    }
}

#[test]
fn a_shard_that_shrinks_after_opening() {
    let dir = folder(&[f32s("x.weight", &[64, 64], &[1.0; 4096])]);
    let checkpoint = open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    let half = std::fs::metadata(&path).unwrap().len() / 2;
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(half).unwrap();
    let specs = [ParamSpec::linear("x", 64, 64, Shard::Rows)];
    for strategy in [LoadStrategy::Eager, LoadStrategy::Lazy] {
        let options = LoadOptions { strategy, ..LoadOptions::default() };
        let error = checkpoint.load(&specs, &options).unwrap_err();
        assert!(matches!(&error, Error::ShortRead { path: named, .. } if *named == path), "{error}");
    }
}

/// A folder with two shards and this index.
fn sharded(index: &str) -> tempfile::TempDir {
    let dir = folder(&[]);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    std::fs::write(
        dir.path().join("a.safetensors"),
        file(&[f32s("x", &[1], &[1.0]), f32s("extra", &[1], &[9.0])]),
    )
    .unwrap();
    std::fs::write(dir.path().join("b.safetensors"), file(&[f32s("y", &[1], &[2.0])])).unwrap();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    dir
}

#[test]
fn the_index_decides_what_exists() {
    let dir =
        sharded(r#"{"metadata":{"total_size":8},"weight_map":{"y":"b.safetensors","x":"a.safetensors"}}"#);
    // A broken file that the index does not name is none of our business.
    std::fs::write(dir.path().join("consolidated.safetensors"), "junk").unwrap();
    let checkpoint = open(dir.path()).unwrap();
    assert!(checkpoint.has("x") && checkpoint.has("y") && !checkpoint.has("extra"));
    let specs = [ParamSpec::vector("x", [1, 1]), ParamSpec::vector("y", [1, 1])];
    let mut params = checkpoint.load(&specs, &LoadOptions::default()).unwrap();
    assert_eq!(params.vector("y").unwrap().values, [2.0]);
}

#[test]
fn lying_indices() {
    for index in [
        r#"{"weight_map":{"x":"../a.safetensors"}}"#,
        r#"{"weight_map":{"x":"/etc/passwd"}}"#,
        r#"{"weight_map":{"x":"sub/../../a.safetensors"}}"#,
        r#"{"weight_map":{"x":""}}"#,
        r#"{"weight_map":{"x":"c.safetensors"}}"#,
        r#"{"weight_map":{"y":"a.safetensors"}}"#,
    ] {
        let error = open(sharded(index).path()).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Index { .. }), "{index}: {error}");
    }
    for index in
        [r#"{"weight_map":{"x":1}}"#, r#"{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}"#, "{}", ""]
    {
        assert!(matches!(open(sharded(index).path()), Err(Error::Json { .. })), "{index}");
    }
}

#[test]
fn names_that_mean_the_same_are_refused() {
    let dir = folder(&[f32s("visual.x", &[1], &[1.0]), f32s("model.visual.x", &[1], &[2.0])]);
    assert!(matches!(open(dir.path()), Err(Error::Mismatch { .. })));
}

#[cfg(unix)]
#[test]
fn shards_may_be_links_as_in_the_cache() {
    let blobs = folder(&[f32s("x", &[1], &[4.0])]);
    let snapshot = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::os::unix::fs::symlink(blobs.path().join(name), snapshot.path().join(name)).unwrap();
    }
    let mut params = open(snapshot.path())
        .unwrap()
        .load(&[ParamSpec::vector("x", [1, 1])], &LoadOptions::default())
        .unwrap();
    assert_eq!(params.vector("x").unwrap().values, [4.0]);
}

#[test]
fn absurd_sizes_in_specs_do_not_allocate() {
    let dir = folder(&[f32s("x.weight", &[1, 1], &[1.0])]);
    let checkpoint = open(dir.path()).unwrap();
    let huge = usize::MAX / 4;
    for spec in [
        ParamSpec::linear("x", huge, huge, Shard::Rows),
        ParamSpec::vector("x.weight", [huge, huge]),
        ParamSpec::experts("mlp.experts", huge, 8, 8),
    ] {
        assert!(checkpoint.load(std::slice::from_ref(&spec), &LoadOptions::default()).is_err());
        assert!(checkpoint.summary(&[spec], 1).is_err());
    }
}

#[test]
fn empty_sides_are_refused() {
    let tensors = [
        super::files::i32s("x.qweight", &[0, 1], &[]),
        super::files::i32s("x.qzeros", &[1, 1], &[0]),
        super::files::f16s("x.scales", &[1, 8], &[1.0; 8]),
    ];
    let dir = folder(&tensors);
    let checkpoint = open(dir.path()).unwrap();
    for spec in [
        ParamSpec::linear("x", 8, 0, Shard::Rows),
        ParamSpec::linear("x", 0, 8, Shard::Rows),
        ParamSpec::fused("x", &[], 8, Shard::Rows),
        ParamSpec::experts("x", 0, 8, 8),
        ParamSpec::vector("x", [1, 0]),
    ] {
        assert!(matches!(checkpoint.load(&[spec], &LoadOptions::default()), Err(Error::Param { .. })));
    }
}

#[test]
fn absurd_groups_of_dummy_weights_are_no_groups() {
    let huge = u64::MAX;
    let spec = ParamSpec::experts("model.layers.0.mlp.experts", 1, 8, 8);
    for scheme in [
        serde_json::json!({"quant_method": "awq", "group_size": huge}),
        serde_json::json!({"quant_method": "fp8", "weight_block_size": [huge, huge]}),
    ] {
        let config = serde_json::json!({ "quantization_config": scheme });
        for rank in [Rank::SINGLE, Rank::new(1, 2).unwrap()] {
            let mut params = crate::dummy(&config, std::slice::from_ref(&spec), 0, rank).unwrap();
            let experts = params.experts(&spec.name).unwrap().experts;
            assert_eq!(experts[0].1.parts[0].k, 8 / rank.world());
        }
    }
}

#[test]
fn more_ranks_than_rows_leave_some_without() {
    let dir = folder(&[f32s("lm_head.weight", &[2, 1], &[1.0, 2.0])]);
    let checkpoint = open(dir.path()).unwrap();
    let spec = ParamSpec::linear("lm_head", 2, 1, Shard::Vocab);
    for (index, rows) in [1, 1, 0].into_iter().enumerate() {
        let options = LoadOptions { rank: Rank::new(index, 3).unwrap(), ..LoadOptions::default() };
        let mut params = checkpoint.load(std::slice::from_ref(&spec), &options).unwrap();
        assert_eq!(params.linear("lm_head").unwrap().n(), rows);
    }
}

#[test]
fn dummy_of_absurd_size_is_refused() {
    let config = serde_json::json!({ "quantization_config": { "quant_method": "awq" } });
    for spec in [
        ParamSpec::linear("lm_head", 1_000_000_000_000, 4096, Shard::Vocab),
        ParamSpec::experts("mlp.experts", usize::MAX, 0, 0),
        ParamSpec::vector("pos_embed", [usize::MAX, usize::MAX]),
    ] {
        assert!(matches!(crate::dummy(&config, &[spec], 0, Rank::SINGLE), Err(Error::Option { .. })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to a header, what is accepted lies inside the file.
    #[test]
    fn mutated_headers(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..6)) {
        let mut bytes = file(&[f32s("a", &[2, 3], &[0.5; 6]), f32s("b", &[], &[3.0])]);
        for (at, value, kind) in changes {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = value,
                1 => bytes.insert(at, b"0123456789[]{},:\"-"[usize::from(value) % 18]),
                _ => { bytes.remove(at); }
            }
        }
        let len = bytes.len() as u64;
        if let Ok(tensors) = parse_header(Path::new("shard"), &mut &bytes[..], len) {
            for tensor in tensors {
                let elements: usize = tensor.shape.iter().product();
                prop_assert_eq!(elements * tensor.dtype.size(), tensor.len);
                prop_assert!(tensor.offset + tensor.len as u64 <= len);
            }
        }
    }
}

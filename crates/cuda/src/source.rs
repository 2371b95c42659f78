//! The kernel sources inside the program. NVRTC gets one text per module: includes are resolved here, and `#line` keeps
//! its messages at the lines of the files.

use std::fmt::Write as _;

use crate::kernels::{
    AdmitParams, ElementsParams, GatherParams, JoinParams, LayerNormParams, PatchesParams, PositionParams,
    SampleParams,
};
use crate::kernels::{
    AttentionParams, EmbedParams, Fp8RowsParams, GemmAddParams, GemmParams, LinearParams, MoeAddParams,
    MoeParams, MoeSortParams, NormParams, Nvfp4MmaParams, ProbeParams, QuantizeParams, RanksNormParams,
    RepackParams, RouterParams, SwigluParams, VisionAttentionParams,
};
use crate::launch::Params;
use crate::{Arch, Error, Result};

/// A `.cu` file, compiled on its own.
#[derive(Debug, Clone, Copy)]
pub struct ModuleSource {
    /// File without `.cu`.
    pub name: &'static str,
    /// Its parameter structs and their sizes on this side.
    params: &'static [(&'static str, usize)],
}

const fn size<P: Params>() -> (&'static str, usize) {
    (P::NAME, size_of::<P>())
}

/// All modules, by name.
pub const MODULES: &[ModuleSource] = &[
    ModuleSource { name: "attention_decode", params: &[size::<AttentionParams>()] },
    ModuleSource { name: "attention_prefill", params: &[size::<AttentionParams>()] },
    ModuleSource { name: "embed", params: &[size::<EmbedParams>()] },
    ModuleSource { name: "fp8_rows", params: &[size::<Fp8RowsParams>()] },
    ModuleSource { name: "gemm_add", params: &[size::<GemmAddParams>()] },
    ModuleSource { name: "gemm_bf16", params: &[size::<GemmParams>()] },
    ModuleSource { name: "gemm_fp8", params: &[size::<GemmParams>()] },
    ModuleSource { name: "gemm_fp8x_g128", params: &[size::<GemmParams>()] },
    ModuleSource { name: "gemm_fp8x_g32", params: &[size::<GemmParams>()] },
    ModuleSource { name: "gemm_fp8x_g64", params: &[size::<GemmParams>()] },
    ModuleSource { name: "gemm_g128", params: &[size::<GemmParams>()] },
    ModuleSource { name: "gemm_g32", params: &[size::<GemmParams>()] },
    ModuleSource { name: "gemm_g64", params: &[size::<GemmParams>()] },
    ModuleSource { name: "gemm_nvfp4", params: &[size::<GemmParams>()] },
    ModuleSource { name: "linear_add", params: &[size::<LinearParams>()] },
    ModuleSource { name: "linear_bf16", params: &[size::<LinearParams>()] },
    ModuleSource { name: "linear_fp8", params: &[size::<LinearParams>()] },
    ModuleSource { name: "linear_int4", params: &[size::<LinearParams>()] },
    ModuleSource { name: "linear_nvfp4", params: &[size::<LinearParams>()] },
    ModuleSource { name: "moe", params: &[size::<MoeParams>()] },
    ModuleSource { name: "moe_bf16", params: &[size::<MoeParams>()] },
    ModuleSource { name: "moe_fp8", params: &[size::<MoeParams>()] },
    ModuleSource { name: "moe_gemm", params: &[size::<MoeSortParams>(), size::<MoeAddParams>()] },
    ModuleSource { name: "moe_int4", params: &[size::<MoeParams>()] },
    ModuleSource { name: "moe_nvfp4", params: &[size::<MoeParams>()] },
    ModuleSource {
        name: "norm",
        params: &[size::<NormParams>(), size::<RanksNormParams>(), size::<LayerNormParams>()],
    },
    ModuleSource {
        name: "nvfp4_mma",
        params: &[size::<GemmParams>(), size::<Nvfp4MmaParams>(), size::<QuantizeParams>()],
    },
    ModuleSource { name: "probe", params: &[size::<ProbeParams>()] },
    ModuleSource { name: "repack", params: &[size::<RepackParams>()] },
    ModuleSource { name: "router", params: &[size::<RouterParams>()] },
    ModuleSource {
        name: "rows",
        params: &[size::<GatherParams>(), size::<JoinParams>(), size::<ElementsParams>()],
    },
    ModuleSource { name: "sample", params: &[size::<SampleParams>()] },
    ModuleSource { name: "sample_admit", params: &[size::<SampleParams>(), size::<AdmitParams>()] },
    ModuleSource { name: "swiglu", params: &[size::<SwigluParams>()] },
    ModuleSource { name: "vision", params: &[size::<PatchesParams>(), size::<PositionParams>()] },
    ModuleSource { name: "vision_attention", params: &[size::<VisionAttentionParams>()] },
];

/// Modules with instructions of [`Arch::has_fp4`]: other architectures do without them.
const WITH_FP4: &[&str] = &["nvfp4_mma"];

/// The modules for `arch`, by name.
pub fn modules_for(arch: Arch) -> Vec<&'static ModuleSource> {
    MODULES.iter().filter(|module| arch.has_fp4() || !WITH_FP4.contains(&module.name)).collect()
}

/// The files of `kernels/`, by name.
const FILES: &[(&str, &str)] = &[
    ("activation.cuh", include_str!("../../../kernels/activation.cuh")),
    ("attention.cuh", include_str!("../../../kernels/attention.cuh")),
    ("attention_copy.cuh", include_str!("../../../kernels/attention_copy.cuh")),
    ("attention_decode.cu", include_str!("../../../kernels/attention_decode.cu")),
    ("attention_prefill.cu", include_str!("../../../kernels/attention_prefill.cu")),
    ("attention_tile.cuh", include_str!("../../../kernels/attention_tile.cuh")),
    ("bf16.cuh", include_str!("../../../kernels/bf16.cuh")),
    ("choose.cuh", include_str!("../../../kernels/choose.cuh")),
    ("decode_linear.cuh", include_str!("../../../kernels/decode_linear.cuh")),
    ("embed.cu", include_str!("../../../kernels/embed.cu")),
    ("fp8.cuh", include_str!("../../../kernels/fp8.cuh")),
    ("fp8_rows.cu", include_str!("../../../kernels/fp8_rows.cu")),
    ("gemm.cuh", include_str!("../../../kernels/gemm.cuh")),
    ("gemm_add.cu", include_str!("../../../kernels/gemm_add.cu")),
    ("gemm_bf16.cu", include_str!("../../../kernels/gemm_bf16.cu")),
    ("gemm_fp8.cu", include_str!("../../../kernels/gemm_fp8.cu")),
    ("gemm_fp8x.cuh", include_str!("../../../kernels/gemm_fp8x.cuh")),
    ("gemm_fp8x_g128.cu", include_str!("../../../kernels/gemm_fp8x_g128.cu")),
    ("gemm_fp8x_g32.cu", include_str!("../../../kernels/gemm_fp8x_g32.cu")),
    ("gemm_fp8x_g64.cu", include_str!("../../../kernels/gemm_fp8x_g64.cu")),
    ("gemm_g128.cu", include_str!("../../../kernels/gemm_g128.cu")),
    ("gemm_g32.cu", include_str!("../../../kernels/gemm_g32.cu")),
    ("gemm_g64.cu", include_str!("../../../kernels/gemm_g64.cu")),
    ("gemm_int4.cuh", include_str!("../../../kernels/gemm_int4.cuh")),
    ("gemm_nvfp4.cu", include_str!("../../../kernels/gemm_nvfp4.cu")),
    ("gemm_pipeline.cuh", include_str!("../../../kernels/gemm_pipeline.cuh")),
    ("gemm_place.cuh", include_str!("../../../kernels/gemm_place.cuh")),
    ("gemm_stage.cuh", include_str!("../../../kernels/gemm_stage.cuh")),
    ("gemm_store.cuh", include_str!("../../../kernels/gemm_store.cuh")),
    ("int4.cuh", include_str!("../../../kernels/int4.cuh")),
    ("linear.cuh", include_str!("../../../kernels/linear.cuh")),
    ("linear_add.cu", include_str!("../../../kernels/linear_add.cu")),
    ("linear_bf16.cu", include_str!("../../../kernels/linear_bf16.cu")),
    ("linear_fp8.cu", include_str!("../../../kernels/linear_fp8.cu")),
    ("linear_int4.cu", include_str!("../../../kernels/linear_int4.cu")),
    ("linear_many.cuh", include_str!("../../../kernels/linear_many.cuh")),
    ("linear_nvfp4.cu", include_str!("../../../kernels/linear_nvfp4.cu")),
    ("moe.cu", include_str!("../../../kernels/moe.cu")),
    ("moe.cuh", include_str!("../../../kernels/moe.cuh")),
    ("moe_bf16.cu", include_str!("../../../kernels/moe_bf16.cu")),
    ("moe_fp8.cu", include_str!("../../../kernels/moe_fp8.cu")),
    ("moe_gemm.cu", include_str!("../../../kernels/moe_gemm.cu")),
    ("moe_int4.cu", include_str!("../../../kernels/moe_int4.cu")),
    ("moe_many.cuh", include_str!("../../../kernels/moe_many.cuh")),
    ("moe_nvfp4.cu", include_str!("../../../kernels/moe_nvfp4.cu")),
    ("norm.cu", include_str!("../../../kernels/norm.cu")),
    ("nvfp4.cuh", include_str!("../../../kernels/nvfp4.cuh")),
    ("nvfp4_mma.cu", include_str!("../../../kernels/nvfp4_mma.cu")),
    ("nvfp4_mma.cuh", include_str!("../../../kernels/nvfp4_mma.cuh")),
    ("nvfp4_quantize.cuh", include_str!("../../../kernels/nvfp4_quantize.cuh")),
    ("pairs.cuh", include_str!("../../../kernels/pairs.cuh")),
    ("prelude.cuh", include_str!("../../../kernels/prelude.cuh")),
    ("probe.cu", include_str!("../../../kernels/probe.cu")),
    ("repack.cu", include_str!("../../../kernels/repack.cu")),
    ("rope.cuh", include_str!("../../../kernels/rope.cuh")),
    ("rounds.cuh", include_str!("../../../kernels/rounds.cuh")),
    ("router.cu", include_str!("../../../kernels/router.cu")),
    ("rows.cu", include_str!("../../../kernels/rows.cu")),
    ("sample.cu", include_str!("../../../kernels/sample.cu")),
    ("sample.cuh", include_str!("../../../kernels/sample.cuh")),
    ("sample_admit.cu", include_str!("../../../kernels/sample_admit.cu")),
    ("sample_slow.cuh", include_str!("../../../kernels/sample_slow.cuh")),
    ("swiglu.cu", include_str!("../../../kernels/swiglu.cu")),
    ("vision.cu", include_str!("../../../kernels/vision.cu")),
    ("vision_attention.cu", include_str!("../../../kernels/vision_attention.cu")),
    ("vision_tile.cuh", include_str!("../../../kernels/vision_tile.cuh")),
];

impl ModuleSource {
    /// The whole text.
    ///
    /// # Errors
    /// [`Error::Include`].
    pub fn text(&self) -> Result<String> {
        resolve(&format!("{}.cu", self.name), FILES)
    }

    /// What the compiler is told besides the architecture.
    pub fn options(&self) -> Vec<String> {
        let mut options = vec!["--std=c++17".to_owned()];
        options.extend(self.params.iter().map(|(name, size)| format!("-DSIZEOF_{name}={size}")));
        options
    }
}

/// `file` with everything that it includes, each file once.
fn resolve(file: &str, files: &[(&str, &str)]) -> Result<String> {
    let mut text = String::new();
    let missing = Error::Include { file: "spark-cuda".into(), line: 0, include: file.into() };
    let source = find(file, files).ok_or(missing)?;
    append(&mut text, (file, source), files, &mut vec![file.to_owned()])?;
    Ok(text)
}

fn find<'a>(name: &str, files: &[(&str, &'a str)]) -> Option<&'a str> {
    files.iter().find(|(file, _)| *file == name).map(|(_, text)| *text)
}

fn append(
    out: &mut String,
    (file, source): (&str, &str),
    files: &[(&str, &str)],
    seen: &mut Vec<String>,
) -> Result<()> {
    // Writing to a string does not fail.
    let _ = writeln!(out, "#line 1 \"{file}\"");
    for (i, line) in source.lines().enumerate() {
        let Some(include) = include_name(line) else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        if !seen.iter().any(|name| name == include) {
            let missing = Error::Include { file: file.into(), line: i + 1, include: include.into() };
            let included = find(include, files).ok_or(missing)?;
            seen.push(include.to_owned());
            append(out, (include, included), files, seen)?;
        }
        let _ = writeln!(out, "#line {} \"{file}\"", i + 2);
    }
    Ok(())
}

/// `x` of a line `#include "x"`.
fn include_name(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?;
    let rest = rest.trim_start().strip_prefix('"')?;
    rest.split_once('"').map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_come_once_and_lines_stay_right() {
        let files = [
            ("a.cu", "// a\n#include \"b.cuh\"\n  # include \"c.cuh\"\nint a;"),
            ("b.cuh", "#include \"c.cuh\"\nint b;"),
            ("c.cuh", "#include \"b.cuh\"\nint c;"),
        ];
        assert_eq!(
            resolve("a.cu", &files).unwrap(),
            "#line 1 \"a.cu\"\n// a\n#line 1 \"b.cuh\"\n#line 1 \"c.cuh\"\n#line 2 \"c.cuh\"\nint c;\n\
             #line 2 \"b.cuh\"\nint b;\n#line 3 \"a.cu\"\n#line 4 \"a.cu\"\nint a;\n"
        );
    }

    #[test]
    fn an_unknown_include_says_where_it_stands() {
        let error = resolve("a.cu", &[("a.cu", "\n#include \"gone.cuh\"\n")]).unwrap_err();
        assert_eq!(error.to_string(), "a.cu:2: `gone.cuh` is not a file of kernels/");
        assert!(resolve("gone.cu", &[]).is_err());
    }

    #[test]
    fn modules_with_fp4_are_for_its_architectures_alone() {
        assert!(WITH_FP4.iter().all(|name| MODULES.iter().any(|module| module.name == *name)));
        let [with, without] = [Arch::Sm121a, Arch::Sm90].map(modules_for);
        assert_eq!(with.len(), MODULES.len());
        assert_eq!(without.len(), MODULES.len() - WITH_FP4.len());
        assert!(!without.iter().any(|module| WITH_FP4.contains(&module.name)));
    }

    /// A file that is not listed would never be compiled.
    #[test]
    fn every_file_of_the_folder_is_embedded_and_every_module_is_whole() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, FILES.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        let modules = MODULES.iter().map(|module| format!("{}.cu", module.name));
        let sources = names.iter().filter(|name| name.ends_with(".cu")).cloned();
        assert_eq!(modules.collect::<Vec<_>>(), sources.collect::<Vec<_>>());
    }

    #[test]
    fn modules_resolve_check_their_parameters_and_include_nothing_foreign() {
        for module in MODULES {
            let text = module.text().unwrap();
            for (name, size) in module.params {
                assert!(text.contains(&format!("PARAMS({name})")), "{}: {name}", module.name);
                assert!(module.options().contains(&format!("-DSIZEOF_{name}={size}")));
            }
            assert!(!text.lines().any(|line| line.trim_start().starts_with("#include")), "{}", module.name);
        }
    }
}

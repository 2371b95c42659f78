//! Mixture of experts: the router's choice and the grouped expert MLPs. Products are in `linear.rs`.

use std::ops::Range;

use crate::CpuBackend;
use crate::linear::{linear, product, transposed};
use crate::math::exp;
use crate::norm::swiglu_row;
use crate::tensor::{Compute, CpuTensor};
use crate::weight::CpuLinear;
use spark_backend::{Error, ExpertsWeight, Result, RouterSpec};

/// One layer's experts.
pub struct CpuExperts {
    /// `gate_up` `[2 * intermediate, hidden]` and `down` `[hidden, intermediate]` of each expert.
    experts: Vec<(CpuLinear, CpuLinear)>,
    hidden: usize,
    intermediate: usize,
}

impl CpuExperts {
    pub(crate) fn new(weight: ExpertsWeight) -> Result<Self> {
        let mut experts = Vec::with_capacity(weight.experts.len());
        for (gate_up, down) in weight.experts {
            experts.push((CpuLinear::new(gate_up)?, CpuLinear::new(down)?));
        }
        let Some((gate_up, down)) = experts.first() else {
            return Err(Error::shape("experts_weight", "at least one expert", "none"));
        };
        let (hidden, intermediate) = (gate_up.k, down.k);
        let want = [2 * intermediate, hidden, hidden, intermediate];
        for (gate_up, down) in &experts {
            let got = [gate_up.n, gate_up.k, down.n, down.k];
            if got != want {
                return Err(Error::shape("experts_weight [n, k] of gate_up and down", want, got));
            }
            if gate_up.bias.is_some() || down.bias.is_some() {
                let reason = "experts with a bias are not supported".to_owned();
                return Err(Error::Unsupported { op: "experts_weight", reason });
            }
        }
        Ok(Self { experts, hidden, intermediate })
    }
}

/// The router's choice for each row.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// `[rows, top_k]` by falling probability.
    experts: Vec<u32>,
    /// `[rows, top_k]`, in the compute dtype.
    weights: Vec<f32>,
    top_k: usize,
    /// The experts whose part of the result is computed here.
    held: Range<usize>,
}

impl Routing {
    /// Chosen experts `[rows, top_k]`, by falling probability; ties by rising index.
    pub fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// Their weights `[rows, top_k]`.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }
}

/// Softmax over all experts in float32, `top_k` of them, renormalised if asked, rounded to the compute dtype.
pub(crate) fn route(compute: &Compute, x: &CpuTensor, spec: &RouterSpec<'_, CpuBackend>) -> Result<Routing> {
    let &RouterSpec { router, top_k, renormalize, experts: ref held } = spec;
    let num_experts = router.n;
    if held.start > held.end || held.end > num_experts {
        return Err(Error::shape("route experts", format!("a part of 0..{num_experts}"), held));
    }
    if top_k == 0 || top_k > num_experts {
        return Err(Error::shape("route top_k", format!("1 to {num_experts}"), top_k));
    }
    let logits = linear(compute, x, router)?;
    let (mut experts, mut weights) = (Vec::new(), Vec::new());
    for logits in logits.values.chunks_exact(num_experts) {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exponentials: Vec<f32> = logits.iter().map(|&logit| exp(logit - highest)).collect();
        let total: f32 = exponentials.iter().sum();
        let probabilities: Vec<f32> = exponentials.iter().map(|e| e / total).collect();
        let mut order: Vec<u32> = (0..num_experts as u32).collect();
        let probability = |e: u32| probabilities[e as usize];
        order.sort_unstable_by(|&a, &b| probability(b).total_cmp(&probability(a)).then(a.cmp(&b)));
        order.truncate(top_k);
        let sum: f32 = if renormalize { order.iter().map(|&e| probability(e)).sum() } else { 1.0 };
        weights.extend(order.iter().map(|&e| compute.rounded(probability(e) / sum)));
        experts.extend(order);
    }
    Ok(Routing { experts, weights, top_k, held: held.clone() })
}

/// One expert's rows: `(row, weight)`, rows ascending.
struct Group<'a> {
    expert: &'a (CpuLinear, CpuLinear),
    rows: Vec<(usize, f32)>,
}

/// The weighted sum of the chosen experts' MLPs. Each expert's weights are read once, for all its rows.
pub(crate) fn moe_mlp(
    compute: &Compute,
    x: &CpuTensor,
    routing: &Routing,
    experts: &CpuExperts,
) -> Result<CpuTensor> {
    let (rows, hidden) = (x.rows(), experts.hidden);
    x.expect("moe_mlp x", [routing.experts.len() / routing.top_k, hidden])?;
    if routing.held.len() != experts.experts.len() {
        return Err(Error::shape("moe_mlp experts", routing.held.len(), experts.experts.len()));
    }
    let mut groups: Vec<Group<'_>> =
        experts.experts.iter().map(|expert| Group { expert, rows: Vec::new() }).collect();
    for (i, (&expert, &weight)) in routing.experts.iter().zip(&routing.weights).enumerate() {
        // What other experts add is another rank's part of the sum.
        if routing.held.contains(&(expert as usize)) {
            groups[expert as usize - routing.held.start].rows.push((i / routing.top_k, weight));
        }
    }
    groups.retain(|group| !group.rows.is_empty());
    let work = routing.experts.len() * hidden * experts.intermediate * 3;
    let results = compute.map(&groups, work, |group| mlp(compute, x, group, experts.intermediate));

    // Where each row's contributions are, experts ascending: groups are in that order.
    let mut sources: Vec<Vec<(&[f32], f32)>> = vec![Vec::with_capacity(routing.top_k); rows];
    for (group, result) in groups.iter().zip(&results) {
        for (&(row, weight), values) in group.rows.iter().zip(result.chunks_exact(hidden)) {
            sources[row].push((values, weight));
        }
    }
    let mut out = vec![0.0; rows * hidden];
    compute.for_chunks(&mut out, hidden, rows * hidden * routing.top_k, |row, out| {
        compute.arch.dispatch(
            #[inline(always)]
            || {
                for &(values, weight) in &sources[row] {
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = value.mul_add(weight, *out));
                }
                out.iter_mut().for_each(|value| *value = compute.rounded(*value));
            },
        );
    });
    Ok(CpuTensor::new(out, [rows, hidden]))
}

/// `down(silu(gate(x)) * up(x))` of a group's rows, `[rows, hidden]`, the last product unrounded.
fn mlp(compute: &Compute, x: &CpuTensor, group: &Group<'_>, intermediate: usize) -> Vec<f32> {
    let m = group.rows.len();
    let (gate_up, down) = group.expert;
    let input: Vec<f32> = group.rows.iter().flat_map(|&(row, _)| x.row(row)).copied().collect();
    let mut gated = transposed(compute, product(compute, gate_up, &input, m), m, None);
    compute.round(&mut gated);
    let mut inner = vec![0.0; m * intermediate];
    compute.for_chunks(&mut inner, intermediate, 16 * m * intermediate, |i, out| {
        compute.arch.dispatch(
            #[inline(always)]
            || swiglu_row(compute, &gated[2 * i * intermediate..][..2 * intermediate], out),
        );
    });
    transposed(compute, product(compute, down, &inner, m), m, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, backend, tensor};
    use crate::{CpuBackend, dequantize};
    use spark_backend::{Backend, Dtype, LinearWeight, Matrix, MatrixData};

    fn dense(values: &[f32], k: usize) -> Matrix {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Matrix { n: values.len() / k, k, data: MatrixData::Dense { dtype: Dtype::F32, values: bytes.into() } }
    }

    fn layer(part: Vec<Matrix>) -> LinearWeight {
        LinearWeight { parts: part, bias: None }
    }

    #[test]
    fn routing_by_hand_with_ties() {
        let b = backend(Dtype::F32);
        let router = b.linear_weight(layer(vec![dense(&[1.0, 2.0, 2.0, 0.0], 1)])).unwrap();
        let x = tensor(&b, vec![1.0, 0.0], 1);
        let route = |top_k, renormalize, experts| {
            route(&b.compute, &x, &RouterSpec { router: &router, top_k, renormalize, experts })
        };
        let routing = route(2, true, 0..4).unwrap();
        assert_eq!(routing.experts(), [1, 2, 0, 1]);
        assert_eq!(routing.weights(), [0.5; 4]);
        let plain = route(1, false, 0..4).unwrap();
        let e = std::f64::consts::E;
        assert_close(plain.weights(), &[e * e / (1.0 + e + 2.0 * e * e), 0.25], 1e-6);
        assert_eq!(route(2, true, 1..2).unwrap().weights(), [0.5; 4], "over all that are chosen");
        assert!(route(5, true, 0..4).is_err() && route(0, true, 0..4).is_err());
        assert!(route(2, true, 2..5).is_err());
    }

    struct Case {
        weight: ExpertsWeight,
        x: Vec<f32>,
        routing: Routing,
    }

    const HIDDEN: usize = 40;
    const INTERMEDIATE: usize = 24;
    const EXPERTS: usize = 7;
    const TOP_K: usize = 3;

    fn case(rows: usize) -> Case {
        let mut random = Random::new(11);
        let expert = |random: &mut Random| {
            let mut matrix = |n: usize, k: usize| dense(&random.normal(n * k), k);
            let gate_up = vec![matrix(INTERMEDIATE, HIDDEN), matrix(INTERMEDIATE, HIDDEN)];
            (layer(gate_up), layer(vec![matrix(HIDDEN, INTERMEDIATE)]))
        };
        let weight = ExpertsWeight { experts: (0..EXPERTS).map(|_| expert(&mut random)).collect() };
        let x = random.normal(rows * HIDDEN);
        let b = backend(Dtype::F32);
        let router = b.linear_weight(layer(vec![dense(&random.normal(EXPERTS * HIDDEN), HIDDEN)])).unwrap();
        let spec = RouterSpec { router: &router, top_k: TOP_K, renormalize: true, experts: 0..EXPERTS };
        let routing = route(&b.compute, &tensor(&b, x.clone(), HIDDEN), &spec).unwrap();
        Case { weight, x, routing }
    }

    #[test]
    fn experts_match_the_definition() {
        let Case { weight, x, routing } = case(13);
        let b = backend(Dtype::F32);
        let times = |weight: &LinearWeight, x: &[f64]| -> Vec<f64> {
            let values: Vec<f32> = weight.parts.iter().flat_map(|part| dequantize(part).unwrap()).collect();
            values
                .chunks_exact(x.len())
                .map(|w| w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum())
                .collect()
        };
        let mut want = vec![0.0; x.len()];
        for (i, (&e, &w)) in routing.experts().iter().zip(routing.weights()).enumerate() {
            let row = i / TOP_K;
            let input: Vec<f64> = x[row * HIDDEN..][..HIDDEN].iter().map(|&v| f64::from(v)).collect();
            let (gate_up, down) = &weight.experts[e as usize];
            let z = times(gate_up, &input);
            let inner: Vec<f64> =
                (0..INTERMEDIATE).map(|j| z[j] / (1.0 + (-z[j]).exp()) * z[INTERMEDIATE + j]).collect();
            for (want, value) in want[row * HIDDEN..].iter_mut().zip(times(down, &inner)) {
                *want += f64::from(w) * value;
            }
        }
        let experts = b.experts_weight(weight).unwrap();
        let got = b.moe_mlp(&tensor(&b, x, HIDDEN), &routing, &experts).unwrap();
        assert_close(got.values(), &want, 1e-5);
    }

    #[test]
    fn a_row_is_the_same_alone_and_batched() {
        let Case { weight, x, routing } = case(9);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let run = |threads, range: std::ops::Range<usize>| {
                let b = CpuBackend::new(dtype, Some(threads)).unwrap();
                let experts = b.experts_weight(weight.clone()).unwrap();
                let x = tensor(&b, x[range.start * HIDDEN..range.end * HIDDEN].to_vec(), HIDDEN);
                let chosen = range.start * TOP_K..range.end * TOP_K;
                let routing = Routing {
                    experts: routing.experts[chosen.clone()].to_vec(),
                    weights: routing.weights[chosen].to_vec(),
                    ..routing.clone()
                };
                b.moe_mlp(&x, &routing, &experts).unwrap().values
            };
            let whole = run(1, 0..9);
            assert_eq!(whole, run(3, 0..9));
            for row in 0..9 {
                assert_eq!(whole[row * HIDDEN..][..HIDDEN], run(2, row..row + 1));
            }
        }
    }

    /// Ranks with whole experts: each adds what its own give, and nothing to rows that have chosen none of them.
    #[test]
    fn parts_of_whole_experts_add_up() {
        let Case { weight, x, routing } = case(13);
        let b = backend(Dtype::F32);
        let x = tensor(&b, x, HIDDEN);
        let run = |held: Range<usize>| {
            let experts = ExpertsWeight { experts: weight.experts[held.clone()].to_vec() };
            let routing = Routing { held, ..routing.clone() };
            b.moe_mlp(&x, &routing, &b.experts_weight(experts).unwrap()).unwrap().values
        };
        let whole: Vec<f64> = run(0..EXPERTS).into_iter().map(f64::from).collect();
        let mut num_empty = 0;
        for cuts in [vec![0, 3, EXPERTS], (0..=EXPERTS).collect()] {
            let mut sum = vec![0.0; whole.len()];
            for held in cuts.windows(2).map(|ends| ends[0]..ends[1]) {
                let part = run(held.clone());
                for (row, part) in part.chunks(HIDDEN).enumerate() {
                    let mut chosen = routing.experts()[row * TOP_K..][..TOP_K].iter();
                    let is_empty = !chosen.any(|&expert| held.contains(&(expert as usize)));
                    num_empty += usize::from(is_empty);
                    assert_eq!(part.iter().all(|&value| value == 0.0), is_empty, "{held:?}, row {row}");
                }
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
            assert_close(&sum, &whole, 1e-5);
        }
        assert!(num_empty > 13, "{num_empty}");
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let Case { mut weight, x, routing } = case(2);
        let b = backend(Dtype::F32);
        let experts = b.experts_weight(weight.clone()).unwrap();
        assert!(b.moe_mlp(&tensor(&b, x.clone(), HIDDEN / 2), &routing, &experts).is_err());
        assert!(b.moe_mlp(&tensor(&b, vec![0.0; HIDDEN], HIDDEN), &routing, &experts).is_err());
        let fewer = b.experts_weight(ExpertsWeight { experts: weight.experts[1..].to_vec() }).unwrap();
        assert!(b.moe_mlp(&tensor(&b, x, HIDDEN), &routing, &fewer).is_err());
        weight.experts[1].1 = layer(vec![dense(&[0.0; 8], 8)]);
        assert!(b.experts_weight(weight).is_err());
        assert!(b.experts_weight(ExpertsWeight { experts: vec![] }).is_err());
    }
}

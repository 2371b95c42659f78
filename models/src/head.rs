//! Which matrix makes logits, and how it is kept. The product is the network's.

use spark_backend::{LinearWeight, MatrixData};
use spark_weights::{Params, to_fp8};

use crate::{Error, Result};

/// Its name in a checkpoint.
pub(crate) const LM_HEAD: &str = "lm_head";

/// How the output head is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadDtype {
    /// As the checkpoint has it.
    #[default]
    Auto,
    /// As the checkpoint has it, which must be dense.
    Bf16,
    /// E4M3 with a scale for each row and 128 inputs, made while it is loaded. Embeddings that are also the head stay, and the head is a
    /// matrix of its own.
    Fp8,
}

/// What the output head is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Whether the checkpoint brings one; else the embeddings are the head.
    pub is_own: bool,
    /// How it is kept.
    pub dtype: HeadDtype,
}

impl From<bool> for Head {
    /// As the checkpoint has it, its own one or the embeddings.
    fn from(is_own: bool) -> Self {
        Self { is_own, dtype: HeadDtype::Auto }
    }
}

impl Head {
    /// The weight to keep beside the embeddings, if any.
    pub(crate) fn weight(
        self,
        params: &mut Params,
        embeddings: &LinearWeight,
    ) -> Result<Option<LinearWeight>> {
        let own = self.is_own.then(|| params.linear(LM_HEAD)).transpose()?;
        Ok(match self.dtype {
            HeadDtype::Auto => own,
            HeadDtype::Bf16 => {
                let head = own.as_ref().unwrap_or(embeddings);
                match head.parts.iter().all(|part| matches!(part.data, MatrixData::Dense { .. })) {
                    true => own,
                    false => return Err(Error::QuantisedHead),
                }
            }
            HeadDtype::Fp8 => Some(to_fp8(LM_HEAD, own.unwrap_or_else(|| embeddings.clone()))?),
        })
    }
}

#[cfg(test)]
mod tests {
    use spark_backend::{Dtype, Matrix};
    use spark_weights::Param;

    use super::*;

    /// One row of ones, of which `lm_head` has `n` if it is there.
    fn dense(n: usize) -> LinearWeight {
        let values: Vec<u8> = [0x80, 0x3f].repeat(n * 8);
        let data = MatrixData::Dense { dtype: Dtype::Bf16, values: values.into() };
        LinearWeight { parts: vec![Matrix { n, k: 8, data }], bias: None }
    }

    fn taken(own: Option<LinearWeight>, dtype: HeadDtype) -> Result<Option<LinearWeight>> {
        let is_own = own.is_some();
        let mut params = Params::new(own.map(|head| (LM_HEAD.to_owned(), Param::Linear(head))))?;
        let head = Head { is_own, dtype }.weight(&mut params, &dense(3));
        params.finish()?;
        head
    }

    #[test]
    fn embeddings_stay_and_a_head_of_fp8_is_a_matrix_of_its_own() {
        for dtype in [HeadDtype::Auto, HeadDtype::Bf16] {
            assert!(taken(None, dtype).unwrap().is_none());
            let own = taken(Some(dense(2)), dtype).unwrap().unwrap();
            assert!(own.n() == 2 && matches!(own.parts[0].data, MatrixData::Dense { .. }));
        }
        for (own, rows) in [(None, 3), (Some(dense(2)), 2)] {
            let head = taken(own, HeadDtype::Fp8).unwrap().unwrap();
            assert!(head.n() == rows && matches!(head.parts[0].data, MatrixData::Fp8 { .. }));
        }
    }

    #[test]
    fn a_quantised_head_is_used_as_it_is_or_not_at_all() {
        let quantised = || to_fp8(LM_HEAD, dense(2)).unwrap();
        assert!(taken(Some(quantised()), HeadDtype::Auto).is_ok());
        let message = |dtype| taken(Some(quantised()), dtype).unwrap_err().to_string();
        assert!(message(HeadDtype::Fp8).contains("is quantised in the checkpoint already"));
        assert!(message(HeadDtype::Bf16).contains("--lm-head-dtype bf16 is for one that is not"));
    }
}

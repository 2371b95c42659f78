//! Loaded parameters, handed out once each. Not the loading.

use std::collections::HashMap;

use spark_backend::{ExpertsWeight, LinearWeight, VectorWeight};

use crate::error::{Error, Result};
use crate::stream::Stream;

/// A loaded parameter.
#[derive(Debug, Clone)]
pub enum Param {
    /// From [`ParamKind::Vector`](crate::ParamKind::Vector).
    Vector(VectorWeight),
    /// From [`ParamKind::Linear`](crate::ParamKind::Linear).
    Linear(LinearWeight),
    /// From [`ParamKind::Experts`](crate::ParamKind::Experts).
    Experts(ExpertsWeight),
}

impl Param {
    fn kind(&self) -> &'static str {
        match self {
            Param::Vector(_) => "a vector",
            Param::Linear(_) => "a linear layer",
            Param::Experts(_) => "experts",
        }
    }

    /// Bytes in host form.
    pub fn num_bytes(&self) -> usize {
        let linear = |weight: &LinearWeight| {
            weight.parts.iter().map(|part| part.num_bytes()).sum::<usize>()
                + weight.bias.as_ref().map_or(0, |bias| 4 * bias.len())
        };
        match self {
            Param::Vector(vector) => 4 * vector.values.len(),
            Param::Linear(weight) => linear(weight),
            Param::Experts(weight) => weight.experts.iter().map(|(up, down)| linear(up) + linear(down)).sum(),
        }
    }
}

/// The parameters of a model by the names of their specs. Each is taken once, which moves it out, so that the host
/// memory goes as the device's comes. They are all there from the start, or made as they are taken
/// ([`Checkpoint::stream`](crate::Checkpoint::stream), [`dummy`](crate::dummy())); then an error of reading comes from the
/// call that takes the parameter.
#[derive(Debug, Default)]
pub struct Params {
    all: HashMap<String, Param>,
    stream: Option<Stream>,
}

impl Params {
    /// From named parameters.
    ///
    /// # Errors
    /// When a name repeats.
    pub fn new(params: impl IntoIterator<Item = (String, Param)>) -> Result<Self> {
        let mut all = HashMap::new();
        for (name, param) in params {
            if all.insert(name.clone(), param).is_some() {
                return Err(Error::Param { name, reason: "is stated twice".to_owned() });
            }
        }
        Ok(Params { all, stream: None })
    }

    pub(crate) fn of_stream(stream: Stream) -> Self {
        Params { all: HashMap::new(), stream: Some(stream) }
    }

    /// Takes the linear layer `name`.
    ///
    /// # Errors
    /// When there is none of this name and kind (left).
    pub fn linear(&mut self, name: &str) -> Result<LinearWeight> {
        match self.take(name)? {
            Param::Linear(weight) => Ok(weight),
            other => Err(wrong_kind(name, &other, "a linear layer")),
        }
    }

    /// Takes the experts `name`.
    ///
    /// # Errors
    /// When there are none of this name and kind (left).
    pub fn experts(&mut self, name: &str) -> Result<ExpertsWeight> {
        match self.take(name)? {
            Param::Experts(weight) => Ok(weight),
            other => Err(wrong_kind(name, &other, "experts")),
        }
    }

    /// Takes the vector or table `name`.
    ///
    /// # Errors
    /// When there is none of this name and kind (left).
    pub fn vector(&mut self, name: &str) -> Result<VectorWeight> {
        match self.take(name)? {
            Param::Vector(weight) => Ok(weight),
            other => Err(wrong_kind(name, &other, "a vector")),
        }
    }

    /// Bytes of what has not been taken; about, where it has yet to be made.
    pub fn num_bytes(&self) -> usize {
        let ready = self.all.values().map(Param::num_bytes).sum::<usize>();
        let left = self.stream.as_ref().map_or(0, |stream| stream.left().1);
        ready.saturating_add(usize::try_from(left).unwrap_or(usize::MAX))
    }

    /// Ends the handing out.
    ///
    /// # Errors
    /// When a parameter has not been taken: a model that states one and does not use it is wrong.
    pub fn finish(self) -> Result<()> {
        let mut unused: Vec<String> = self.all.into_keys().collect();
        unused.extend(self.stream.map(|stream| stream.left().0).unwrap_or_default());
        if unused.is_empty() {
            return Ok(());
        }
        unused.sort();
        Err(Error::Incomplete { unfilled: Vec::new(), unused })
    }

    fn take(&mut self, name: &str) -> Result<Param> {
        let streamed = || self.stream.as_ref().and_then(|stream| stream.take(name));
        self.all.remove(name).map(Ok).or_else(streamed).unwrap_or_else(|| {
            Err(Error::Param {
                name: name.to_owned(),
                reason: "was not stated in the specs, or was taken before".to_owned(),
            })
        })
    }
}

fn wrong_kind(name: &str, found: &Param, wanted: &str) -> Error {
    Error::Param {
        name: name.to_owned(),
        reason: format!("was stated as {}, asked for as {wanted}", found.kind()),
    }
}

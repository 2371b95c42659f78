//! An opened checkpoint: its folder, JSON side files and the catalogue of its tensors. No tensor data is read here.

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::cache::through;
use crate::error::{Error, Result};
use crate::header::{TensorInfo, UniqueMap, read_header};
use crate::load::{LoadOptions, NUM_WORKERS, Parts, load};
use crate::locate::{is_inside, locate};
use crate::names::normalise;
use crate::params::{Param, Params};
use crate::plan::Plan;
use crate::spec::ParamSpec;
use crate::stream::Stream;
use crate::summary::{Summary, summarise};

/// Largest `config.json` and the like.
const MAX_CONFIG: u64 = 16 << 20;
/// Largest index: a 4-bit 235B checkpoint has some 100,000 entries of about 130 bytes.
const MAX_INDEX: u64 = 256 << 20;
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const SINGLE: &str = "model.safetensors";

/// How to find a model.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Branch, tag or commit of a Hugging Face id; `main` if `None`. Unused for a folder.
    pub revision: Option<String>,
    /// The Hugging Face cache; `None` asks `HF_HUB_CACHE`, `HF_HOME` and the home folder.
    pub cache_dir: Option<PathBuf>,
}

/// A checkpoint in safetensors form: the catalogue of what is stored where. Cheap to keep; files are opened for
/// reading in [`Checkpoint::load`].
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    generation_config: Option<Value>,
    /// Shards, by the number that `Stored::file` holds.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) tensors: Vec<Stored>,
    /// Normalised name -> position in `tensors`.
    by_name: HashMap<String, usize>,
}

/// A tensor and the shard it is in.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) info: TensorInfo,
    pub(crate) file: usize,
    pub(crate) normalised: String,
}

impl Checkpoint {
    /// Finds `model` (a folder, or an id in the Hugging Face cache), reads its configuration, its index and the header
    /// of every shard. Nothing is downloaded.
    ///
    /// # Errors
    /// When it is not there, or when a file lies about itself: the message names file, tensor and offset.
    pub fn open(model: &str, options: &OpenOptions) -> Result<Self> {
        let mut checkpoint = Self::open_config(model, options)?;
        checkpoint.read_catalogue()?;
        Ok(checkpoint)
    }

    /// As [`Checkpoint::open`], but with the configuration files alone: for dummy weights. It has no tensors.
    ///
    /// # Errors
    /// When it is not there, or a configuration is not JSON.
    pub fn open_config(model: &str, options: &OpenOptions) -> Result<Self> {
        let dir = locate(model, options.revision.as_deref(), options.cache_dir.as_deref())?;
        let config = read_json(&dir.join("config.json"), MAX_CONFIG)?;
        let generation = dir.join("generation_config.json");
        let generation_config =
            if generation.exists() { Some(read_json(&generation, MAX_CONFIG)?) } else { None };
        Ok(Checkpoint { generation_config, ..Self::of_config(config, dir) })
    }

    /// A checkpoint that is a configuration and nothing else: for dummy weights. Its folder is `dir`, which need not
    /// hold anything.
    pub fn of_config(config: Value, dir: PathBuf) -> Self {
        Checkpoint {
            dir,
            config,
            generation_config: None,
            files: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        }
    }

    /// The folder (of a cached id: the snapshot).
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// `generation_config.json`, where there is one.
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// Whether a tensor of this name exists, in any dialect (`model.X` finds `model.language_model.X` and the like).
    /// For a weight that may be quantised use [`Checkpoint::has_module`].
    pub fn has(&self, tensor: &str) -> bool {
        self.find(&normalise(tensor)).is_some()
    }

    /// Whether the weight of a linear layer exists, plain or quantised, for example `lm_head`.
    pub fn has_module(&self, module: &str) -> bool {
        let module = normalise(&format!("{module}.weight"));
        let module = module.strip_suffix(".weight").unwrap_or(&module);
        ["weight", "qweight", "weight_packed"]
            .iter()
            .any(|kind| self.find(&format!("{module}.{kind}")).is_some())
    }

    /// Every tensor, by shard and offset, with its name as stored.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.iter().map(|stored| &stored.info)
    }

    /// Loads the parameters of a model. Every tensor has to be consumed and every parameter filled, else the error
    /// lists them all; only scales of activations and of the KV cache may stay unused.
    pub fn load(&self, specs: &[ParamSpec], options: &LoadOptions) -> Result<Params> {
        self.collect(&Plan::new(self, specs, options.rank)?, specs, options)
    }

    /// Loads like [`Checkpoint::load`], but bit by bit: what is taken from the result is loaded a few gigabytes ahead of it,
    /// in the order of `specs`, or when it is asked for. So a model goes to a device without being in the host's memory, which
    /// on some machines is the same memory.
    ///
    /// # Errors
    /// As [`Checkpoint::load`] for what is missing or left over; what cannot be read or is broken is told when it is taken.
    pub fn stream(&self, specs: &[ParamSpec], options: &LoadOptions) -> Result<Params> {
        let plan = Plan::new(self, specs, options.rank)?;
        let mut parts = Parts::new(self.clone(), plan, specs, options)?;
        let names = specs.iter().enumerate().map(|(index, spec)| (spec.name.clone(), index)).collect();
        let source = match &options.cache {
            Some(folder) => through(folder, self, specs, options, parts)?,
            None => {
                parts.join(options, true)?;
                Box::new(parts)
            }
        };
        Ok(Params::of_stream(Stream::new(names, source, NUM_WORKERS)?))
    }

    /// Loads parameters as [`Checkpoint::load`] does, but leaves alone the tensors that `specs` do not name: for tools
    /// that go through a model piece by piece.
    ///
    /// # Errors
    /// When a parameter is not filled or cannot be read.
    pub fn load_some(&self, specs: &[ParamSpec], options: &LoadOptions) -> Result<Params> {
        self.collect(&Plan::of_some(self, specs, options.rank)?, specs, options)
    }

    /// The bytes of one tensor as stored; its type and shape are in [`Checkpoint::tensors`].
    ///
    /// # Errors
    /// When there is no tensor of this name, in any dialect, or it cannot be read.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>> {
        let Some(tensor) = self.find(&normalise(name)) else {
            return Err(Error::Param {
                name: name.to_owned(),
                reason: "is not in the checkpoint".to_owned(),
            });
        };
        let (path, info) = (self.path_of(tensor), &self.tensors[tensor].info);
        let io = |action, offset| move |source| Error::Io { path: path.to_owned(), action, offset, source };
        let file = std::fs::File::open(path).map_err(io("cannot open", None))?;
        let mut bytes = vec![0; info.len];
        file.read_exact_at(&mut bytes, info.offset).map_err(io("cannot read", Some(info.offset)))?;
        Ok(bytes)
    }

    fn collect(&self, plan: &Plan, specs: &[ParamSpec], options: &LoadOptions) -> Result<Params> {
        let slots: Vec<_> = specs.iter().map(|_| parking_slot()).collect();
        load(self, plan, specs, options, &|index, param| {
            *slots[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(param);
            Ok(())
        })?;
        let filled = slots
            .into_iter()
            .map(|slot| slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner));
        Params::new(specs.iter().zip(filled).filter_map(|(spec, param)| Some((spec.name.clone(), param?))))
    }

    /// Loads like [`Checkpoint::load`], but gives each parameter to `sink` as soon as it is complete (its index in
    /// `specs`, its value), from several threads and in no order, so that a device can take it before the next is in
    /// memory. An error of `sink` stops the load.
    pub fn load_each(
        &self,
        specs: &[ParamSpec],
        options: &LoadOptions,
        sink: &(dyn Fn(usize, Param) -> Result<()> + Sync),
    ) -> Result<()> {
        load(self, &Plan::new(self, specs, options.rank)?, specs, options, sink)
    }

    /// What [`Checkpoint::load`] would load: schemes and bytes of each part of the model, and what each of `world`
    /// ranks would hold. Reads no data.
    pub fn summary(&self, specs: &[ParamSpec], world: usize) -> Result<Summary> {
        summarise(self, specs, world)
    }

    /// The tensor of a normalised name.
    pub(crate) fn find(&self, normalised: &str) -> Option<usize> {
        self.by_name.get(normalised).copied()
    }

    /// Path of the shard that holds `tensor`.
    pub(crate) fn path_of(&self, tensor: usize) -> &Path {
        &self.files[self.tensors[tensor].file]
    }

    /// Fills the catalogue from the index and the shards, or from the single file.
    fn read_catalogue(&mut self) -> Result<()> {
        let index = self.dir.join(INDEX);
        if !index.exists() {
            let path = self.dir.join(SINGLE);
            let tensors = read_header(&path)?;
            return self.add_file(path, tensors);
        }
        let wrong = |reason| Error::Index { path: index.clone(), reason };
        // Shard -> its tensors according to the index, in the order of the index.
        let mut shards: Vec<(String, Vec<String>)> = Vec::new();
        let mut numbers: HashMap<String, usize> = HashMap::new();
        for (tensor, shard) in read_index(&index)? {
            if !is_inside(&shard) {
                return Err(wrong(format!(
                    "tensor `{tensor}` is said to be in `{shard}`, which leaves the model folder"
                )));
            }
            let number = *numbers.entry(shard.clone()).or_insert_with(|| {
                shards.push((shard, Vec::new()));
                shards.len() - 1
            });
            shards[number].1.push(tensor);
        }
        for (shard, names) in shards {
            let path = self.dir.join(&shard);
            if !path.exists() {
                return Err(wrong(format!("shard `{shard}` with {} tensors is missing", names.len())));
            }
            let mut there: HashMap<String, TensorInfo> =
                read_header(&path)?.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
            let mut tensors = Vec::with_capacity(names.len());
            for name in names {
                let Some(tensor) = there.remove(&name) else {
                    return Err(wrong(format!(
                        "tensor `{name}` is not in `{shard}`, where the index has it"
                    )));
                };
                tensors.push(tensor);
            }
            tensors.sort_by_key(|tensor| tensor.offset);
            self.add_file(path, tensors)?;
        }
        Ok(())
    }

    fn add_file(&mut self, path: PathBuf, tensors: Vec<TensorInfo>) -> Result<()> {
        let file = self.files.len();
        for info in tensors {
            let normalised = normalise(&info.name);
            if let Some(other) = self.by_name.insert(normalised.clone(), self.tensors.len()) {
                let other = &self.tensors[other].info.name;
                return Err(Error::Mismatch {
                    path,
                    reason: format!("means the same parameter as `{other}`"),
                    tensor: info.name,
                });
            }
            self.tensors.push(Stored { info, file, normalised });
        }
        self.files.push(path);
        Ok(())
    }
}

fn parking_slot() -> std::sync::Mutex<Option<Param>> {
    std::sync::Mutex::new(None)
}

/// The `weight_map` of an index: tensor name and shard, no name twice.
pub(crate) fn read_index(path: &Path) -> Result<Vec<(String, String)>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let bytes = read_limited(path, MAX_INDEX)?;
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    Ok(index.weight_map.0)
}

fn read_json(path: &Path, limit: u64) -> Result<Value> {
    let bytes = read_limited(path, limit)?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })
}

/// A whole file of at most `limit` bytes.
fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let io = |action| move |source| Error::Io { path: path.to_owned(), action, offset: None, source };
    let file = std::fs::File::open(path).map_err(io("cannot open"))?;
    let size = file.metadata().map_err(io("cannot stat"))?.len();
    if size > limit {
        return Err(Error::TooLarge { path: path.to_owned(), size, limit });
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io("cannot read"))?;
    Ok(bytes)
}

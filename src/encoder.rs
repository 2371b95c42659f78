//! The vision encoder alone: how long pictures take. No engine, no text; random pixels. Passes and ranks are the runtime's, as in a
//! step.

use std::time::{Duration, Instant};

use spark_backend::{Backend, VectorWeight};
use spark_models::{ModelConfig, VisionConfig};
use spark_runtime::{EncodeBatch, Medium};

use crate::{
    Error, ModelFiles, Result,
    start::{Place, Settings, UseBackend},
};

/// Pictures to encode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pictures {
    /// Width and height of each in pixels, multiples of what a token covers.
    pub sizes: Vec<[usize; 2]>,
    /// All of them as the media of one step, instead of a step for each.
    pub together: bool,
}

impl Pictures {
    /// Most tokens that are encoded at once, for a model whose tokens are `side` pixels wide and high.
    pub(crate) fn most_tokens(&self, side: usize) -> usize {
        let tokens = self.sizes.iter().map(|[width, height]| (width / side) * (height / side));
        if self.together { tokens.sum() } else { tokens.max().unwrap_or(0) }
    }

    /// The steps in which they are encoded.
    fn batches(&self, config: &ModelConfig, world: usize) -> Result<Vec<EncodeBatch>> {
        let Some(vision) = &config.vision else {
            return Err(Error::option("MODEL", "a text model has no encoder for pictures"));
        };
        if self.sizes.is_empty() {
            return Err(Error::option("--images", "there is no picture"));
        }
        let mut media = self.sizes.iter().map(|&size| medium(size, vision)).collect::<Result<Vec<_>>>()?;
        if self.together {
            return Ok(vec![EncodeBatch::new(media, config, world)]);
        }
        Ok(media.drain(..).map(|medium| EncodeBatch::new(vec![medium], config, world)).collect())
    }
}

/// A picture of noise.
fn medium([width, height]: [usize; 2], vision: &VisionConfig) -> Result<Medium> {
    let token = vision.patch_size * vision.spatial_merge_size;
    if [width, height].iter().any(|&side| side == 0 || !side.is_multiple_of(token)) {
        let problem = format!("{width}x{height}: the side of a picture must be a multiple of {token} pixels");
        return Err(Error::option("--images", problem));
    }
    // One frame, which the backend repeats to the length of a patch in time.
    let len = (width * height * 3) as u64;
    let pixels = (0..len).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    Ok(Medium { grid: [1, height / vision.patch_size, width / vision.patch_size], pixels })
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct EncoderTimes {
    /// What computed.
    pub device: String,
    /// For each of the lists of pictures.
    pub lists: Vec<ListTimes>,
}

/// What was measured with one list of pictures.
#[derive(Debug, Clone, Default)]
pub struct ListTimes {
    /// The time of every repetition.
    pub times: Vec<Duration>,
    /// Patches of all pictures.
    pub num_patches: usize,
    /// Patches that the rank with most of them encoded.
    pub most_patches: usize,
}

/// Loads a model and encodes pictures; nothing else of it is used.
pub(crate) struct EncodePictures<'a> {
    pub(crate) files: ModelFiles,
    pub(crate) pictures: &'a [Pictures],
    pub(crate) repetitions: usize,
}

impl UseBackend for EncodePictures<'_> {
    type Output = EncoderTimes;

    fn run<B: Backend>(self, settings: &Settings, mut backend: B, mut place: Place) -> Result<EncoderTimes> {
        // Reading it back waits for all work before it.
        let mark = backend.vector(VectorWeight { values: vec![0.0; 16], shape: [1, 16] })?;
        let (model, memory) = settings.load(self.files, &backend, place.team.as_mut())?;
        let vocab_size = model.config().text.vocab_size;
        backend.allocate_state(memory.state(&settings.options, vocab_size))?;
        let mut lists = Vec::with_capacity(self.pictures.len());
        for pictures in self.pictures {
            let batches = pictures.batches(model.config(), backend.rank().world())?;
            let mut list = ListTimes {
                times: Vec::with_capacity(self.repetitions),
                num_patches: batches.iter().map(EncodeBatch::num_patches).sum(),
                most_patches: batches.iter().map(EncodeBatch::most_patches).sum(),
            };
            for repetition in 0..=self.repetitions {
                let began = Instant::now();
                for batch in &batches {
                    batch.encode(&model, &backend)?;
                }
                backend.to_host(&mark)?;
                // The first one warms up.
                if repetition > 0 {
                    list.times.push(began.elapsed());
                }
            }
            lists.push(list);
        }
        Ok(EncoderTimes { device: place.device, lists })
    }
}

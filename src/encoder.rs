//! The vision encoder alone: how long pictures take. No engine, no text; random pixels. Ranks divide the pictures of a pass, as in
//! a step.

use std::time::{Duration, Instant};

use spark_backend::{Backend, Rank, VectorWeight};
use spark_models::{Encoded, Qwen3Vl};

use crate::{
    Error, ModelFiles, Result,
    start::{Place, Settings, UseBackend},
};

/// Equal square pictures that are encoded one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pictures {
    /// How many.
    pub count: usize,
    /// Side in pixels, a multiple of what a token covers.
    pub side: usize,
    /// All of them in one pass of the encoder instead of one pass each.
    pub together: bool,
}

impl Pictures {
    /// How many go through the encoder at once.
    pub(crate) fn in_a_pass(self) -> usize {
        if self.together { self.count } else { 1 }
    }
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct EncoderTimes {
    /// What computed.
    pub device: String,
    /// For each of the pictures, the time of every repetition.
    pub times: Vec<Vec<Duration>>,
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
        let mut times = Vec::with_capacity(self.pictures.len());
        for &pictures in self.pictures {
            let (pixels, side, passes) = passes(&model, pictures)?;
            let pass = Pass { pixels, grid: [1, side, side], count: pictures.in_a_pass() };
            let mut of_pictures = Vec::with_capacity(self.repetitions);
            for repetition in 0..=self.repetitions {
                let began = Instant::now();
                for _ in 0..passes {
                    pass.encode(&model, &backend)?;
                }
                backend.to_host(&mark)?;
                // The first one warms up.
                if repetition > 0 {
                    of_pictures.push(began.elapsed());
                }
            }
            times.push(of_pictures);
        }
        Ok(EncoderTimes { device: place.device, times })
    }
}

/// Pictures that go through the encoder together.
struct Pass {
    pixels: Vec<u8>,
    grid: [usize; 3],
    count: usize,
}

impl Pass {
    /// Encodes this rank's share and brings what each rank has to all others.
    fn encode<B: Backend>(&self, model: &Qwen3Vl<B>, backend: &B) -> Result<Vec<Encoded<B>>> {
        let (rank, one) = (backend.rank(), self.pixels.len() / self.count);
        let share = rank.range(self.count);
        let pixels = &self.pixels[share.start * one..share.end * one];
        let mut mine = match share.len() {
            0 => Vec::new(),
            count => model.encode_all(backend, pixels, self.grid, count, &mut |_, _| {})?,
        };
        if rank.world() == 1 {
            return Ok(mine);
        }
        let mut mine = mine.drain(..);
        let owners = (0..rank.world()).filter_map(|index| Rank::new(index, rank.world()));
        let owners = owners.flat_map(|owner| owner.range(self.count).map(move |_| owner));
        owners
            .map(|owner| self.exchange(model, backend, owner, (owner == rank).then(|| mine.next()).flatten()))
            .collect()
    }

    /// A picture of rank `owner`, which alone brings it.
    fn exchange<B: Backend>(
        &self,
        model: &Qwen3Vl<B>,
        backend: &B,
        owner: Rank,
        encoded: Option<Encoded<B>>,
    ) -> Result<Encoded<B>> {
        let config = model.config();
        let merged = config.vision.as_ref().map_or(1, |vision| vision.spatial_merge_size.pow(2));
        let shape = [self.grid.iter().product::<usize>() / merged, config.text.hidden_size];
        let exchange = |tensor: Option<B::Tensor>| {
            let is_mine = tensor.is_some();
            let tensor = backend.broadcast(tensor, shape, owner.index())?;
            if is_mine { Ok(tensor) } else { backend.keep(&tensor) }
        };
        let (embeddings, deepstack) =
            encoded.map_or((None, Vec::new()), |encoded| (Some(encoded.embeddings), encoded.deepstack));
        let mut deepstack = deepstack.into_iter();
        Ok(Encoded {
            embeddings: exchange(embeddings)?,
            deepstack: (0..config.num_deepstack())
                .map(|_| exchange(deepstack.next()))
                .collect::<spark_backend::Result<_>>()?,
        })
    }
}

/// Pixels of a pass, patches of a picture's side, and the number of passes.
fn passes<B: Backend>(model: &Qwen3Vl<B>, pictures: Pictures) -> Result<(Vec<u8>, usize, usize)> {
    let Some(vision) = &model.config().vision else {
        return Err(Error::option("MODEL", "a text model has no encoder for pictures"));
    };
    let Pictures { count, side, together } = pictures;
    let token = vision.patch_size * vision.spatial_merge_size;
    if count == 0 || side == 0 || !side.is_multiple_of(token) {
        let problem = format!("{count}x{side}: the side of a picture must be a multiple of {token} pixels");
        return Err(Error::option("--images", problem));
    }
    // A picture is one frame, which the backend repeats to the length of a patch in time.
    let len = pictures.in_a_pass() * side * side * 3;
    let pixels = (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    Ok((pixels, side / vision.patch_size, if together { 1 } else { count }))
}

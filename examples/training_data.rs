//! Training data of the demo model on stdout: packed batches (see `Batch::write`), or with `--text` the prompts as text.
//! `cargo run --release --example training_data -- --model models/spark-tiny-vl/bf16 --batches 1 | wc -c`
//!
//! Samples come from `spark-suite` and go through the template, tokenizer and image processor of the engine, so that the
//! model is trained on the very tokens and pixels that it will be served. Not a reader: that is `train.py`.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::{Map, Value};
use spark_models::RopeIndex;
use spark_suite::{Picture, Sample, Split, Task, tasks};
use spark_text::{ChatTemplate, RenderInput, Segment, Tokenizer, expand_placeholders};
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ImageProcessorOverrides, RgbImage};

/// Batches that may wait for the reader, per thread.
const QUEUE_PER_THREAD: usize = 2;
/// First four bytes of a batch.
const MAGIC: u32 = 0x3142_5653;

#[derive(Parser)]
struct Args {
    /// Folder with tokenizer, chat template and image processor settings.
    #[arg(long)]
    model: PathBuf,
    /// Draw from the held-out contents instead of the training contents.
    #[arg(long)]
    held_out: bool,
    /// Index of the first sample.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Batches to write; 0 never ends.
    #[arg(long, default_value_t = 0)]
    batches: usize,
    /// Most tokens in a batch.
    #[arg(long, default_value_t = 32768)]
    max_tokens: usize,
    /// Most patches in a batch.
    #[arg(long, default_value_t = 65536)]
    max_patches: usize,
    /// Sequences longer than this are left out.
    #[arg(long, default_value_t = 1024)]
    max_sequence: usize,
    /// Relative weights of tasks in place of the suite's: `read_text=4,add=2`. Others keep theirs.
    #[arg(long, value_delimiter = ',')]
    weights: Vec<String>,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Write this many rendered samples as JSON strings, one a line, instead of batches.
    #[arg(long)]
    text: Option<u64>,
    /// Write the names of the tasks, in the order of their indices.
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if args.list {
        let names: Vec<_> = tasks().map(|task| task.name).collect();
        writeln!(io::stdout(), "{}", names.join("\n"))?;
        return Ok(());
    }
    let encoder = Arc::new(Encoder::open(&args.model)?);
    let mix = Arc::new(Mix::new(&args.weights, if args.held_out { Split::HeldOut } else { Split::Train })?);
    let mut out = io::stdout().lock();
    if let Some(count) = args.text {
        for index in args.first..args.first + count {
            let text = encoder.render_whole(&mix.sample(index).1)?.concat();
            writeln!(out, "{}", Value::String(text))?;
        }
        return Ok(());
    }
    let next = Arc::new(AtomicU64::new(args.first));
    let (sender, batches) = mpsc::sync_channel(QUEUE_PER_THREAD * args.threads);
    let limits = Limits { tokens: args.max_tokens, patches: args.max_patches, sequence: args.max_sequence };
    for _ in 0..args.threads {
        let (encoder, mix, next, sender) = (encoder.clone(), mix.clone(), next.clone(), sender.clone());
        // It ends when nobody takes its batches any more.
        thread::spawn(move || while sender.send(pack(&encoder, &mix, &next, limits)).is_ok() {});
    }
    drop(sender);
    let wanted = if args.batches == 0 { usize::MAX } else { args.batches };
    for batch in batches.into_iter().take(wanted) {
        match batch?.write(&mut out) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            result => result?,
        }
    }
    Ok(())
}

/// Tasks by weight.
struct Mix {
    tasks: Vec<(&'static Task, f64)>,
    split: Split,
}

impl Mix {
    fn new(changes: &[String], split: Split) -> anyhow::Result<Self> {
        let mut tasks: Vec<_> = tasks().map(|task| (task, task.weight)).collect();
        for change in changes {
            let (name, weight) = change.split_once('=').context("a weight is NAME=NUMBER")?;
            let task = tasks.iter_mut().find(|(task, _)| task.name == name);
            task.with_context(|| format!("there is no task {name}"))?.1 = weight.parse()?;
        }
        Ok(Self { tasks, split })
    }

    /// The place of the task in the list, and its sample. Spreads the tasks evenly over consecutive indices.
    fn sample(&self, index: u64) -> (usize, Sample) {
        /// Fractions of its multiples are evenly spread (golden ratio).
        const STEP: f64 = 0.618_033_988_749_894_9;
        let total: f64 = self.tasks.iter().map(|(_, weight)| weight).sum();
        let mut point = (index as f64 * STEP).fract() * total;
        let mut chosen = 0;
        for (i, (_, weight)) in self.tasks.iter().enumerate() {
            chosen = i;
            if point < *weight {
                break;
            }
            point -= weight;
        }
        (chosen, self.tasks[chosen].0.sample(self.split, index))
    }
}

/// Samples to tokens and patches, with the engine's parts.
struct Encoder {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    processor: ImageProcessor,
    image_token: u32,
}

/// One sample, ready to pack.
struct Encoded {
    task: usize,
    ids: Vec<u32>,
    num_prompt_tokens: usize,
    positions: Vec<[u32; 3]>,
    grids: Vec<[usize; 3]>,
    patches: Vec<u8>,
}

impl Encoder {
    fn open(folder: &Path) -> anyhow::Result<Self> {
        let tokenizer = Tokenizer::from_dir(folder)?;
        let template = ChatTemplate::from_dir(folder, &tokenizer)?;
        let options = DecodeOptions::new(Alpha::OverWhite);
        let processor =
            ImageProcessor::from_folder(folder, &ImageProcessorOverrides::default(), options, [0; 32])?;
        let image_token =
            tokenizer.token_to_id("<|image_pad|>").context("no <|image_pad|> in the vocabulary")?;
        Ok(Self { tokenizer, template, processor, image_token })
    }

    fn render(&self, sample: &Sample, messages: Vec<Value>, generate: bool) -> anyhow::Result<String> {
        let tools = Value::Array(sample.tools.clone());
        // In the assistant's own turn the switch for thinking says nothing: the message has its thoughts.
        let none = Map::new();
        let segments = self.template.render(RenderInput {
            messages: &Value::Array(messages),
            tools: (!sample.tools.is_empty()).then_some(&tools),
            kwargs: if generate { &sample.template_kwargs } else { &none },
            add_generation_prompt: generate,
        })?;
        Ok(segments.iter().map(Segment::text).collect())
    }

    /// The prompt, and the answer up to and with the token that ends it.
    fn render_whole(&self, sample: &Sample) -> anyhow::Result<[String; 2]> {
        let prompt = self.render(sample, sample.messages.clone(), true)?;
        let mut messages = sample.messages.clone();
        messages.push(sample.answer.clone());
        let whole = self.render(sample, messages, false)?;
        let answer = whole.strip_prefix(&prompt).with_context(|| {
            format!("the template does not continue the prompt:\n{prompt}\n--- whole:\n{whole}")
        })?;
        Ok([prompt, answer.trim_end_matches('\n').to_owned()])
    }

    fn encode(&self, task: usize, sample: &Sample) -> anyhow::Result<Encoded> {
        let [prompt, answer] = self.render_whole(sample)?;
        let mut encoded = Encoded {
            task,
            ids: self.tokenizer.encode_trusted(&prompt)?,
            num_prompt_tokens: 0,
            positions: Vec::new(),
            grids: Vec::new(),
            patches: Vec::new(),
        };
        for Picture { width, height, rgb } in &sample.pictures {
            let image = RgbImage::new(*height, *width, rgb.clone()).context("the picture has other sizes")?;
            let (patches, grid) = self.processor.cut(&image)?;
            encoded.patches.extend(patches);
            encoded.grids.push(grid);
        }
        let merge = self.processor.config().merge_size;
        let counts: Vec<_> = encoded.grids.iter().map(|[t, h, w]| t * h * w / merge.pow(2)).collect();
        let (mut ids, offsets) = expand_placeholders(&encoded.ids, self.image_token, &counts)?;
        let media: Vec<_> = offsets.into_iter().zip(encoded.grids.iter().copied()).collect();
        let index = RopeIndex::new(ids.len(), &media, merge);
        encoded.num_prompt_tokens = ids.len();
        ids.extend(self.tokenizer.encode_trusted(&answer)?);
        encoded.positions = (0..ids.len()).map(|i| index.position(i)).collect();
        encoded.ids = ids;
        Ok(encoded)
    }
}

#[derive(Clone, Copy)]
struct Limits {
    tokens: usize,
    patches: usize,
    sequence: usize,
}

/// Draws samples until the next one does not fit.
fn pack(encoder: &Encoder, mix: &Mix, next: &AtomicU64, limits: Limits) -> anyhow::Result<Batch> {
    let patch_bytes = 3 * encoder.processor.config().patch_size.pow(2);
    let mut batch = Batch::default();
    loop {
        let (task, sample) = mix.sample(next.fetch_add(1, Ordering::Relaxed));
        let encoded = encoder.encode(task, &sample)?;
        let num_patches = encoded.patches.len() / patch_bytes;
        if encoded.ids.len() > limits.sequence {
            continue;
        }
        ensure!(
            num_patches <= limits.patches,
            "a sample has {num_patches} patches, the batch {}",
            limits.patches
        );
        if batch.ids.len() + encoded.ids.len() > limits.tokens
            || batch.patches.len() / patch_bytes + num_patches > limits.patches
        {
            return Ok(batch);
        }
        batch.push(encoded)?;
    }
}

/// Sequences one after another, without padding.
#[derive(Default)]
struct Batch {
    lengths: Vec<u32>,
    tasks: Vec<u32>,
    grids: Vec<u16>,
    ids: Vec<u16>,
    positions: [Vec<u16>; 3],
    learned: Vec<u8>,
    patches: Vec<u8>,
}

impl Batch {
    fn push(&mut self, sample: Encoded) -> anyhow::Result<()> {
        self.lengths.push(u32::try_from(sample.ids.len())?);
        self.tasks.push(u32::try_from(sample.task)?);
        for (i, &id) in sample.ids.iter().enumerate() {
            self.ids.push(u16::try_from(id)?);
            self.learned.push(u8::from(i >= sample.num_prompt_tokens));
            for (axis, position) in self.positions.iter_mut().zip(sample.positions[i]) {
                axis.push(u16::try_from(position)?);
            }
        }
        for [_, rows, columns] in sample.grids {
            self.grids.extend([u16::try_from(rows)?, u16::try_from(columns)?]);
        }
        self.patches.extend(sample.patches);
        Ok(())
    }

    /// Little endian: `MAGIC`, counts of sequences, images, tokens and bytes of patches as u32; then u32 lengths and task
    /// indices `[sequences]`; u16 rows and columns in patches `[images, 2]`; u16 ids `[tokens]`; u16 positions
    /// `[3, tokens]`; u8 whether a token belongs to the answer `[tokens]`; u8 patches `[patches, 3, patch, patch]`.
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let counts = [self.lengths.len(), self.grids.len() / 2, self.ids.len(), self.patches.len()];
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend(counts.iter().flat_map(|&count| (count as u32).to_le_bytes()));
        bytes.extend([&self.lengths, &self.tasks].into_iter().flatten().flat_map(|n| n.to_le_bytes()));
        let [time, rows, columns] = &self.positions;
        let shorts = [&self.grids, &self.ids, time, rows, columns];
        bytes.extend(shorts.into_iter().flatten().flat_map(|n| n.to_le_bytes()));
        bytes.extend(&self.learned);
        out.write_all(&bytes)?;
        out.write_all(&self.patches)
    }
}

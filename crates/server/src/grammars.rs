//! Compiles grammars beside everything else, a few at a time, and remembers them. Reads no fields.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use spark_api::TokenId;
use spark_text::{
    CompiledGrammar, Grammar, GrammarCompiler, GrammarConstraint, GrammarStart, TextError, Tokenizer,
};

use crate::ApiError;
use crate::lru::ByteLru;
use crate::pool::CpuPool;
use crate::structured::Wanted;

/// Most bytes of compiled grammars that are remembered, by a guess at what each takes.
const MAX_CACHE_BYTES: usize = 256 << 20;
/// What a compiled grammar takes with what sequences have learned about it, and for each byte of its text.
const MIN_BYTES: usize = 2 << 20;
const BYTES_PER_BYTE: usize = 64;

/// The compiler of a front end. It is made when the first request needs it: most servers never do.
pub(crate) struct Grammars {
    state: Arc<State>,
    /// Its own: a storm of grammars must not hold up prompts and images.
    pool: CpuPool,
}

struct State {
    compiler: OnceLock<Result<GrammarCompiler, String>>,
    tokenizer: Arc<Tokenizer>,
    eos: Vec<TokenId>,
    compiled: Mutex<ByteLru<[u8; 32], Arc<CompiledGrammar>>>,
}

/// The grammar of a prompt's answers.
#[derive(Clone)]
pub(crate) struct AnswerGrammar {
    compiled: Arc<CompiledGrammar>,
    start: GrammarStart,
    /// Named when the grammar turns out to be too much for a token.
    pub(crate) field: &'static str,
}

impl AnswerGrammar {
    /// For the choices of one prompt: clones of it share what they learn about the grammar.
    pub(crate) fn constraint(&self) -> GrammarConstraint {
        self.compiled.constraint(self.start)
    }
}

impl Grammars {
    /// For a model whose sequences end with `eos`.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, eos: &[TokenId]) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let state = State {
            compiler: OnceLock::new(),
            tokenizer,
            eos: eos.to_vec(),
            compiled: Mutex::new(ByteLru::new(MAX_CACHE_BYTES)),
        };
        Self { state: Arc::new(state), pool: CpuPool::of(cores.div_ceil(2)) }
    }

    /// Compiles what a request wants, for outputs that begin with `start`.
    ///
    /// # Errors
    /// Names the field, the place in the grammar, and the rule that is broken.
    pub(crate) async fn compile(
        &self,
        wanted: Wanted,
        start: GrammarStart,
    ) -> Result<AnswerGrammar, ApiError> {
        let Wanted { grammar, field } = wanted;
        let state = self.state.clone();
        let compiled = self.pool.run(move || state.compiled(&grammar, field)).await?;
        Ok(AnswerGrammar { compiled, start, field })
    }
}

impl State {
    /// What is remembered, or compiled now. The text of a grammar may be long: even to look it up is work for the pool.
    fn compiled(&self, grammar: &Grammar, field: &'static str) -> Result<Arc<CompiledGrammar>, ApiError> {
        let text = format!("{grammar:?}");
        let key = *blake3::hash(text.as_bytes()).as_bytes();
        let known = self.compiled.lock().get(&key);
        if let Some(compiled) = known {
            return Ok(compiled);
        }
        let make = || GrammarCompiler::new(&self.tokenizer, &self.eos).map_err(|error| error.to_string());
        let compiler = self.compiler.get_or_init(make).as_ref().map_err(|error| ApiError::internal(error))?;
        let refuse = |error: TextError| ApiError::field(field, format!("{field}: {error}"));
        let compiled = Arc::new(compiler.compile(grammar).map_err(refuse)?);
        self.compiled.lock().insert(key, compiled.clone(), MIN_BYTES + BYTES_PER_BYTE * text.len());
        Ok(compiled)
    }
}

//! A loaded GGUF model: weights, vocabulary, chat template.

use std::sync::OnceLock;

use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::vocab::LlamaVocab;
use llama_cpp_sys_2 as sys;

use crate::config::{GPU_BUILD, ModelConfig};
use crate::error::Error;
use crate::gguf::Header;
use crate::native_log;
use crate::template::ChatTemplate;

/// Longer texts than this cannot be a prompt of any model, and llama.cpp counts bytes in 32 bits.
const LONGEST_TEXT: usize = 256 << 20;

/// A model in memory. Immutable; contexts and samplers borrow it through an `Arc`.
#[derive(Debug)]
pub struct Model {
    inner: LlamaModel,
    vocabulary: u32,
    bos: Option<i32>,
    eos: Option<i32>,
    sep: Option<i32>,
    /// Whether a token sees only those before it.
    causal: bool,
    template: Option<Result<ChatTemplate, Error>>,
    /// How many positions back the model attends, where that is limited.
    pub(crate) window: u32,
}

impl Model {
    /// Loads the file. `progress` hears shares from 0 to 1 and stops the load by answering `false`.
    ///
    /// Returns the model and the bytes that llama.cpp reported for its weights.
    pub(crate) fn load(
        config: &ModelConfig,
        header: &Header,
        mut progress: impl FnMut(f32) -> bool + 'static,
    ) -> Result<(Self, u64), Error> {
        let failed = |reason: String| Error::Load { model: config.id.clone(), reason };
        let stopped = std::rc::Rc::new(std::cell::Cell::new(false));
        let noted = stopped.clone();
        let mut params = LlamaModelParams::default().with_progress_callback(move |share| {
            let go_on = progress(share);
            noted.set(!go_on);
            go_on
        });
        match config.gpu_layers {
            Some(layers) => params = params.with_n_gpu_layers(layers),
            None if !GPU_BUILD => params = params.with_n_gpu_layers(0),
            None => {}
        }
        let (loaded, heard) = native_log::listen(|| LlamaModel::load_from_file(backend(), &config.path, &params));
        let inner = match loaded {
            Ok(inner) => inner,
            Err(_) if stopped.get() => return Err(Error::Abandoned),
            Err(_) => return Err(failed(heard.reason())),
        };
        let raw = raw(&inner);
        // SAFETY: `raw` is the live model.
        let (vocabulary_type, encodes, decodes, window) = unsafe {
            (
                sys::llama_vocab_type(sys::llama_model_get_vocab(raw)),
                sys::llama_model_has_encoder(raw),
                sys::llama_model_has_decoder(raw),
                sys::llama_model_n_swa(raw),
            )
        };
        if vocabulary_type == sys::LLAMA_VOCAB_TYPE_NONE {
            return Err(failed("it has no tokenizer".into()));
        }
        if encodes || !decodes {
            return Err(failed(format!(
                "`{}` models read one text and write another, which this plugin does not do",
                header.architecture()
            )));
        }
        let causal = header.flag(&format!("{}.attention.causal", header.architecture())) != Some(false);
        let vocabulary = u32::try_from(inner.n_vocab()).unwrap_or(0);
        let mut model = Self {
            inner,
            vocabulary,
            bos: None,
            eos: None,
            sep: None,
            causal,
            template: None,
            window: u32::try_from(window).unwrap_or(0),
        };
        // SAFETY: `raw` is the live model.
        model.sep = model.special(LlamaToken::new(unsafe { sys::llama_vocab_sep(sys::llama_model_get_vocab(raw)) }));
        model.bos = model.special(model.vocab().bos());
        model.eos = model.special(model.vocab().eos());
        let text = |token: Option<i32>| token.map(|token| model.special_text(token)).unwrap_or_default();
        let (bos, eos) = (text(model.bos), text(model.eos));
        model.template = header.text("tokenizer.chat_template").map(|source| ChatTemplate::new(source, bos, eos));
        Ok((model, heard.allocated))
    }

    pub(crate) fn inner(&self) -> &LlamaModel {
        &self.inner
    }

    pub(crate) fn raw(&self) -> *mut sys::llama_model {
        raw(&self.inner)
    }

    /// How many tokens the model knows; their ids are 0 and up.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// The tokens of a text. With `special`, control tokens in the text are read as such.
    pub fn tokenize(&self, text: &str, special: bool) -> Result<Vec<i32>, Error> {
        if text.len() > LONGEST_TEXT {
            return Err(Error::Invalid(format!("the text has {} bytes, at most {LONGEST_TEXT} are accepted", text.len())));
        }
        // BOS and EOS are added by the callers: llama.cpp asserts that they exist where it is told to add them.
        Ok(self.vocab().tokenize(text.as_bytes(), false, special).into_iter().map(|token| token.0).collect())
    }

    /// The tokens of a prompt: control tokens are read as such, and the model's BOS is in front where it wants one.
    pub fn tokenize_prompt(&self, text: &str) -> Result<Vec<i32>, Error> {
        let mut tokens = self.tokenize(text, true)?;
        if let Some(bos) = self.bos
            && self.vocab().should_add_bos()
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    /// Whether the model continues text. One that does not reads a text whole, and embeds it.
    pub fn is_causal(&self) -> bool {
        self.causal
    }

    /// The tokens of a text to be embedded: a prompt, with the model's separator or EOS at the end where it wants one.
    pub fn tokenize_whole(&self, text: &str) -> Result<Vec<i32>, Error> {
        let mut tokens = self.tokenize_prompt(text)?;
        // SAFETY: the model is live.
        if let Some(sep) = self.sep
            && unsafe { sys::llama_vocab_get_add_sep(sys::llama_model_get_vocab(self.raw())) }
            && tokens.last() != Some(&sep)
        {
            tokens.push(sep);
        }
        if let Some(eos) = self.eos
            && self.vocab().should_add_eos()
            && tokens.last() != Some(&eos)
        {
            tokens.push(eos);
        }
        Ok(tokens)
    }

    /// Appends the bytes of a token as they appear in an answer: nothing for control tokens.
    pub(crate) fn bytes_into(&self, token: i32, buffer: &mut Vec<u8>) {
        self.vocab().token_to_piece_into(LlamaToken::new(token), buffer, false, None);
    }

    /// The bytes of a token, control tokens spelt out.
    pub(crate) fn spelling(&self, token: i32) -> Vec<u8> {
        self.vocab().token_to_piece(LlamaToken::new(token), true, None)
    }

    /// Whether a token ends the answer.
    pub(crate) fn ends(&self, token: i32) -> bool {
        self.vocab().is_eog(LlamaToken::new(token))
    }

    /// The model's chat template.
    ///
    /// # Errors
    /// `Invalid` when it has none, `Template` when it cannot be compiled.
    pub fn template(&self) -> Result<&ChatTemplate, Error> {
        match &self.template {
            Some(Ok(template)) => Ok(template),
            Some(Err(error)) => Err(error.clone()),
            None => Err(Error::Invalid("this model has no chat template: send plain text instead of messages".into())),
        }
    }

    /// Whether every id is a token of this model.
    pub fn check_tokens(&self, tokens: &[i32]) -> Result<(), Error> {
        match tokens.iter().find(|&&token| !u32::try_from(token).is_ok_and(|token| token < self.vocabulary)) {
            Some(token) => Err(Error::Invalid(format!("{token} is no token of this model, which has {}", self.vocabulary))),
            None => Ok(()),
        }
    }

    fn vocab(&self) -> LlamaVocab<'_> {
        self.inner.vocab()
    }

    fn special(&self, token: LlamaToken) -> Option<i32> {
        (0..self.vocabulary as i32).contains(&token.0).then_some(token.0)
    }

    fn special_text(&self, token: i32) -> String {
        String::from_utf8_lossy(&self.spelling(token)).into_owned()
    }
}

fn raw(model: &LlamaModel) -> *mut sys::llama_model {
    // SAFETY: `LlamaModel` is `repr(transparent)` over its pointer to the model. The safe crate keeps it to itself, and its
    // version is pinned to the digit.
    unsafe { *std::ptr::from_ref(model).cast::<*mut sys::llama_model>() }
}

/// llama.cpp's global state, set up once per process and kept.
fn backend() -> &'static LlamaBackend {
    static BACKEND: OnceLock<LlamaBackend> = OnceLock::new();
    BACKEND.get_or_init(|| {
        native_log::install();
        // The only error is that somebody else in this program has set it up already, and then it is there to be used.
        LlamaBackend::init().unwrap_or(LlamaBackend {})
    })
}

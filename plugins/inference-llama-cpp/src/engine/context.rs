//! A llama.cpp context: KV cache, batches, logits.
//!
//! `llama_cpp_2::LlamaContext` keeps its pointer to itself, and with it the abort callback, the thread count of a live context and
//! the context per sequence. So this is a context of our own over the C interface, with the checks that keep a batch away from
//! llama.cpp's asserts.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_cpp_sys_2 as sys;

use super::model::Model;
use crate::config::CacheType;
use crate::error::Error;
use crate::native_log;

/// What a context is made for.
pub struct Shape {
    /// Tokens per sequence.
    pub context: u32,
    pub sequences: u32,
    /// The most tokens of one decode.
    pub batch: u32,
    pub cache_keys: CacheType,
    pub cache_values: CacheType,
    /// Whether it gives a vector for each token; otherwise it gives logits for those that are asked for.
    pub embeddings: bool,
}

pub struct Context {
    raw: NonNull<sys::llama_context>,
    model: Arc<Model>,
    /// Read by the abort callback during a decode.
    stop: Arc<AtomicBool>,
    /// Tokens per sequence.
    pub context: u32,
    batch: u32,
    threads: i32,
}

// SAFETY: a context is bound to no thread. It is not `Sync`, and every method that computes takes `&mut self`.
unsafe impl Send for Context {}

/// Why a decode did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeError {
    /// `stop` was set meanwhile.
    Stopped,
    /// llama.cpp's own code.
    Failed(i32),
}

impl Context {
    /// Makes a context. Its decodes end early once `stop` is set (those on the CPU).
    ///
    /// Returns it with the bytes that llama.cpp reported to have allocated.
    pub fn new(model: Arc<Model>, shape: &Shape, stop: Arc<AtomicBool>) -> Result<(Self, u64), Error> {
        // SAFETY: returns plain values.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = shape.context.next_multiple_of(256).saturating_mul(shape.sequences);
        params.n_seq_max = shape.sequences;
        params.n_batch = shape.batch;
        params.n_ubatch = shape.batch;
        params.n_threads = 1;
        params.n_threads_batch = 1;
        params.type_k = shape.cache_keys.ggml();
        params.type_v = shape.cache_values.ggml();
        params.no_perf = true;
        // Each sequence has a part of the cache to itself: what one holds neither slows nor shifts another.
        params.kv_unified = false;
        params.abort_callback = Some(is_stopped);
        params.abort_callback_data = Arc::as_ptr(&stop).cast_mut().cast::<c_void>();
        if shape.embeddings {
            params.embeddings = true;
            params.pooling_type = sys::LLAMA_POOLING_TYPE_NONE;
        } else {
            params.n_outputs_max = shape.sequences;
        }
        // SAFETY: the model lives as long as the context, which holds it; `stop` too.
        let (raw, heard) = native_log::listen(|| unsafe { sys::llama_init_from_model(model.raw(), params) });
        let raw = NonNull::new(raw).ok_or_else(|| Error::Failed(heard.reason()))?;
        // SAFETY: `raw` is live.
        let (per_sequence, batch, memory) = unsafe {
            (sys::llama_n_ctx_seq(raw.as_ptr()), sys::llama_n_batch(raw.as_ptr()), sys::llama_get_memory(raw.as_ptr()))
        };
        let context = Self { raw, model, stop, context: per_sequence.min(shape.context), batch, threads: 1 };
        if memory.is_null() && !shape.embeddings {
            return Err(Error::Failed("this kind of model has no cache, so it cannot continue text".into()));
        }
        Ok((context, heard.allocated))
    }

    /// Computes a batch. On an error the batch is not in the cache, or only in part: forget its sequences.
    pub fn decode(&mut self, batch: &mut Batch) -> Result<(), DecodeError> {
        if batch.len() == 0 || batch.len() > self.batch as usize {
            // llama.cpp would assert on it.
            return Err(DecodeError::Failed(-1));
        }
        // SAFETY: `raw` is live, the batch's arrays are as long as it says, and its sequences and tokens are in range by `add`.
        match unsafe { sys::llama_decode(self.raw.as_ptr(), batch.view()) } {
            0 => Ok(()),
            2 if self.stop.load(Ordering::Relaxed) => Err(DecodeError::Stopped),
            code => Err(DecodeError::Failed(code)),
        }
    }

    /// The logits of an entry of the last batch that asked for them: one per token of the vocabulary.
    pub fn logits(&self, entry: usize) -> Option<&[f32]> {
        // SAFETY: the pointer is null or points to one row of logits, which stays until the next decode, a `&mut` call.
        unsafe {
            let row = sys::llama_get_logits_ith(self.raw.as_ptr(), i32::try_from(entry).ok()?);
            (!row.is_null()).then(|| slice::from_raw_parts(row, self.model.vocabulary() as usize))
        }
    }

    /// The vector of an entry of the last batch, in a context for embeddings.
    pub fn embedding(&self, entry: usize) -> Option<&[f32]> {
        // SAFETY: as for `logits`; a row has the model's output width.
        unsafe {
            let row = sys::llama_get_embeddings_ith(self.raw.as_ptr(), i32::try_from(entry).ok()?);
            let width = usize::try_from(sys::llama_model_n_embd_out(self.model.raw())).ok()?;
            (!row.is_null()).then(|| slice::from_raw_parts(row, width))
        }
    }

    /// Forgets what a sequence holds from `position` on, and returns how much is left: `position`, or 0 where the model's cache
    /// cannot be cut (recurrent layers) or no longer reaches back far enough (a sliding window).
    pub fn truncate(&mut self, sequence: i32, position: usize) -> usize {
        // SAFETY: `raw` is live, and so is its memory, where it has one; the sequence is one that it was made for.
        unsafe {
            let memory = sys::llama_get_memory(self.raw.as_ptr());
            if memory.is_null() {
                return 0;
            }
            if position > 0 && sys::llama_memory_seq_rm(memory, sequence, position as i32, -1) {
                let first = sys::llama_memory_seq_pos_min(memory, sequence);
                let last = sys::llama_memory_seq_pos_max(memory, sequence);
                let reach = if self.model.window == 0 { 0 } else { (position as i32 - self.model.window as i32).max(0) };
                if (0..=reach).contains(&first) && last + 1 == position as i32 {
                    return position;
                }
            }
            sys::llama_memory_seq_rm(memory, sequence, -1, -1);
            0
        }
    }

    /// Computes on this many threads from now on.
    pub fn set_threads(&mut self, threads: i32) {
        if self.threads != threads {
            self.threads = threads;
            // SAFETY: `raw` is live; the call sets two numbers.
            unsafe { sys::llama_set_n_threads(self.raw.as_ptr(), threads, threads) };
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `llama_init_from_model` and is freed once; the model outlives it.
        unsafe { sys::llama_free(self.raw.as_ptr()) };
    }
}

unsafe extern "C" fn is_stopped(stop: *mut c_void) -> bool {
    // SAFETY: points into the `Arc` that the context holds.
    unsafe { &*stop.cast::<AtomicBool>() }.load(Ordering::Relaxed)
}

/// Tokens to be computed in one go, of one or several sequences.
pub struct Batch {
    tokens: Vec<i32>,
    positions: Vec<i32>,
    sequences: Vec<i32>,
    /// Each token belongs to one sequence: all ones, and pointers into `sequences`.
    counts: Vec<i32>,
    pointers: Vec<*mut i32>,
    outputs: Vec<i8>,
    capacity: usize,
}

impl Batch {
    pub fn new(capacity: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(capacity),
            positions: Vec::with_capacity(capacity),
            sequences: Vec::with_capacity(capacity),
            counts: vec![1; capacity],
            pointers: vec![std::ptr::null_mut(); capacity],
            outputs: Vec::with_capacity(capacity),
            capacity,
        }
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn room(&self) -> usize {
        self.capacity - self.tokens.len()
    }

    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.outputs.clear();
    }

    /// Adds a token and returns its entry's number. With `output`, logits can be read at that number after the decode.
    pub fn add(&mut self, token: i32, position: usize, sequence: i32, output: bool) -> usize {
        assert!(self.room() > 0, "the batcher never fills a batch beyond its capacity");
        self.tokens.push(token);
        self.positions.push(position as i32);
        self.sequences.push(sequence);
        self.outputs.push(output.into());
        self.tokens.len() - 1
    }

    fn view(&mut self) -> sys::llama_batch {
        let first = self.sequences.as_mut_ptr();
        for (place, pointer) in self.pointers[..self.sequences.len()].iter_mut().enumerate() {
            *pointer = first.wrapping_add(place);
        }
        sys::llama_batch {
            n_tokens: self.tokens.len() as i32,
            token: self.tokens.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.counts.as_mut_ptr(),
            seq_id: self.pointers.as_mut_ptr(),
            logits: self.outputs.as_mut_ptr(),
        }
    }
}

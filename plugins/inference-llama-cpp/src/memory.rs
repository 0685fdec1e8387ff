//! Whether a model fits, known before it is loaded.
//!
//! The estimate comes from the file's header alone. Weights and KV cache follow exactly from it; the compute buffers are bounded
//! from above by the largest intermediate results.

use std::fmt;
use std::fs;

use crate::config::ModelConfig;
use crate::gguf::Header;

/// What a context takes at most without being told: more is rarely used, and its memory is taken at once.
const DEFAULT_CONTEXT: u32 = 4096;

/// llama.cpp rounds each sequence's context up to this.
const CONTEXT_STEP: u32 = 256;

/// Bits per weight of a Q4_K_M file, by the table in llama.cpp's `tools/quantize/README.md`.
const Q4_K_M_BITS: f64 = 4.89;

/// What loading a model takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Estimate {
    pub weights: u64,
    pub cache: u64,
    pub compute: u64,
}

impl Estimate {
    pub fn total(&self) -> u64 {
        self.weights + self.cache + self.compute
    }
}

/// A model that does not fit, and what would.
#[derive(Debug, Clone, PartialEq)]
pub struct Misfit {
    pub needed: u64,
    pub free: u64,
    /// Where the memory is: `memory`, or a GPU's name.
    pub place: String,
    /// The longest context that would fit.
    pub context: Option<u32>,
    /// Whether a Q4_K_M file of this model is smaller and would fit.
    pub smaller_file: bool,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "needs {} of {}, {} free", gib(self.needed), self.place, gib(self.free))?;
        match (self.context, self.smaller_file) {
            (Some(context), true) => write!(f, ": try context {context} or a Q4_K_M file"),
            (Some(context), false) => write!(f, ": try context {context} or fewer parallel generations"),
            (None, true) => write!(f, ": try a Q4_K_M file"),
            (None, false) => write!(f, ": try a smaller model"),
        }
    }
}

fn gib(bytes: u64) -> String {
    if bytes >= 1 << 29 {
        format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
    } else {
        format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
    }
}

/// Tokens per sequence: what the configuration says, or what the model was trained on within reason.
///
/// # Errors
/// A context longer than the model was trained on: it would answer, but not sensibly.
pub fn context(header: &Header, config: &ModelConfig) -> Result<u32, String> {
    let trained =
        header.of_architecture("context_length").and_then(|trained| u32::try_from(trained).ok()).unwrap_or(DEFAULT_CONTEXT);
    match config.context {
        Some(context) if context > trained => {
            Err(format!("`context` is {context}, but the model was trained on {trained} tokens: configure at most that"))
        }
        Some(context) => Ok(context),
        None => Ok(trained.min(DEFAULT_CONTEXT)),
    }
}

/// What the model takes with this context, on the CPU and on GPUs together.
pub fn estimate(header: &Header, config: &ModelConfig, context: u32) -> Estimate {
    let layers = header.of_architecture("block_count").unwrap_or(0);
    let width = header.of_architecture("embedding_length").unwrap_or(0);
    let vocabulary = header.array_len("tokenizer.ggml.tokens").unwrap_or(0);
    let architecture = header.architecture();
    let per_layer = |key: &str, layer: u64| header.per_layer(&format!("{architecture}.{key}"), layer as usize);

    let mut cache_per_token = 0;
    let mut widest_feed_forward = 0;
    let mut most_heads = 1;
    for layer in 0..layers {
        let heads = per_layer("attention.head_count", layer).unwrap_or(1);
        let kv_heads = per_layer("attention.head_count_kv", layer).unwrap_or(heads);
        let head_width = width / heads.max(1);
        let keys = kv_heads * header.of_architecture("attention.key_length").unwrap_or(head_width);
        let values = kv_heads * header.of_architecture("attention.value_length").unwrap_or(head_width);
        cache_per_token += (keys * config.cache_keys.bytes_per_32() + values * config.cache_values.bytes_per_32()) / 32;
        widest_feed_forward = widest_feed_forward.max(per_layer("feed_forward_length", layer).unwrap_or(4 * width));
        most_heads = most_heads.max(heads);
    }
    let parallel = u64::from(config.parallel);
    let step = u64::from(config.prefill_chunk) + parallel;
    let tokens = u64::from(context.next_multiple_of(CONTEXT_STEP));
    // Per token of a step: the residual stream in a few copies, gate, up and their product, one row of the attention mask, and
    // the softmax rows of every head where flash attention is not to be had.
    let activations = 4 * (6 * width + 3 * widest_feed_forward + tokens + most_heads * 64);
    Estimate {
        weights: header.weights,
        cache: cache_per_token * tokens * parallel,
        compute: step * activations + 2 * parallel * vocabulary * 4,
    }
}

/// How a model is divided between the CPU's memory and the GPUs'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    pub host: u64,
    pub gpu: u64,
}

/// Layers are offloaded from the last one; the output matrix goes with them, the KV cache of a layer lies where the layer lies.
pub fn split(header: &Header, estimate: &Estimate, gpu_layers: u32) -> Split {
    let layers = header.of_architecture("block_count").unwrap_or(0).max(1);
    let offloaded = u64::from(gpu_layers).min(layers);
    if gpu_layers == 0 {
        return Split { host: estimate.total(), gpu: 0 };
    }
    let blocks: u64 = header.block_weights.values().sum();
    let on_gpu: u64 = header.block_weights.iter().rev().take(offloaded as usize).map(|(_, bytes)| bytes).sum();
    let others = estimate.weights.saturating_sub(blocks);
    let output = if u64::from(gpu_layers) > layers { others / 2 } else { 0 };
    let gpu = on_gpu + output + estimate.cache * offloaded / layers + estimate.compute;
    Split { host: estimate.total().saturating_sub(gpu), gpu }
}

/// Compares what a model needs in one place with what is free there, and says what would fit if it does not.
pub fn fit(header: &Header, config: &ModelConfig, context: u32, needed: u64, free: u64, place: &str) -> Result<(), Misfit> {
    if needed <= free {
        return Ok(());
    }
    let now = estimate(header, config, context);
    let over = needed - free;
    let shorter = |context: u32| now.total().saturating_sub(estimate(header, config, context).total());
    let mut fitting = None;
    let mut candidate = context.next_multiple_of(CONTEXT_STEP);
    while candidate > CONTEXT_STEP {
        candidate -= CONTEXT_STEP;
        if shorter(candidate) >= over {
            fitting = Some(candidate);
            break;
        }
    }
    let q4 = (header.parameters as f64 * Q4_K_M_BITS / 8.0) as u64;
    let smaller_file = q4 < header.weights && header.weights - q4 >= over;
    Err(Misfit { needed, free, place: place.to_owned(), context: fitting, smaller_file })
}

/// Memory that this process can still take, in bytes: the least of what the machine, the control group and the process's own
/// limit leave. `None` where the system does not tell.
pub fn free() -> Option<u64> {
    [available(), group_room(), own_room()].into_iter().flatten().min()
}

fn available() -> Option<u64> {
    kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// The value of a line such as `MemAvailable:   123 kB`, in bytes.
fn kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line[key.len()..].split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// What the control group (a container, a systemd unit) leaves. File pages are given back under pressure, so they count as free.
fn group_room() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::"))?.trim().trim_start_matches('/').to_owned();
    let mut folder = std::path::Path::new("/sys/fs/cgroup").join(own);
    let mut least = None;
    while folder.starts_with("/sys/fs/cgroup") {
        if let Some(room) = group_room_in(&folder) {
            least = Some(least.map_or(room, |least: u64| least.min(room)));
        }
        folder.pop();
    }
    least
}

fn group_room_in(folder: &std::path::Path) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?;
    let used = number("memory.current")?;
    let stat = fs::read_to_string(folder.join("memory.stat")).ok()?;
    let pages: u64 = stat.lines().filter_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok()).sum();
    Some(limit.saturating_sub(used.saturating_sub(pages)))
}

/// What the process's limit on address space leaves, where one is set.
fn own_room() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    let answered = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) } == 0;
    if !answered || limit.rlim_cur == libc::RLIM_INFINITY {
        return None;
    }
    let used = kib(&fs::read_to_string("/proc/self/status").ok()?, "VmSize:")?;
    Some(limit.rlim_cur.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn tiny_chat() -> Header {
        Header::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-chat/tiny-chat-q8_0.gguf")).unwrap()
    }

    #[test]
    fn the_cache_follows_from_the_shape() {
        let config = ModelConfig { parallel: 3, ..ModelConfig::new("a", "a") };
        let estimate = estimate(&tiny_chat(), &config, 2048);
        // 4 layers, 2 key/value heads of 64, keys and values, two bytes each, 2048 tokens, 3 sequences.
        assert_eq!(estimate.cache, 4 * 2 * 64 * 2 * 2 * 2048 * 3);
        assert!(estimate.weights > 3_400_000 && estimate.weights < 3_710_080);
        assert!(estimate.compute > 100_000 && estimate.compute < 50_000_000, "{}", estimate.compute);
    }

    #[test]
    fn the_default_context_is_the_trained_one_and_more_is_refused() {
        let header = tiny_chat();
        assert_eq!(context(&header, &ModelConfig::new("a", "a")), Ok(2048));
        let config = ModelConfig { context: Some(512), ..ModelConfig::new("a", "a") };
        assert_eq!(context(&header, &config), Ok(512));
        let config = ModelConfig { context: Some(4096), ..ModelConfig::new("a", "a") };
        assert!(context(&header, &config).unwrap_err().contains("2048"));
    }

    #[test]
    fn a_misfit_says_what_would_fit() {
        let header = tiny_chat();
        let config = ModelConfig::new("a", "a");
        let needed = estimate(&header, &config, 2048).total();
        assert_eq!(fit(&header, &config, 2048, needed, needed, "memory"), Ok(()));
        let misfit = fit(&header, &config, 2048, needed, needed - 1_000_000, "memory").unwrap_err();
        let shorter = misfit.context.unwrap();
        assert!(estimate(&header, &config, shorter).total() <= needed - 1_000_000);
        assert!(estimate(&header, &config, shorter + 256).total() > needed - 1_000_000);
        assert!(misfit.smaller_file);
        let text = misfit.to_string();
        assert!(text.starts_with("needs ") && text.ends_with("or a Q4_K_M file"), "{text}");
        let hopeless = fit(&header, &config, 2048, needed, 1000, "memory").unwrap_err();
        assert_eq!((hopeless.context, hopeless.smaller_file), (None, false));
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        let misfit = Misfit {
            needed: 9_771_050_598,
            free: 8_375_186_227,
            place: "memory".into(),
            context: Some(8192),
            smaller_file: true,
        };
        assert_eq!(misfit.to_string(), "needs 9.1 GiB of memory, 7.8 GiB free: try context 8192 or a Q4_K_M file");
    }

    #[test]
    fn offloaded_layers_leave_the_host() {
        let header = tiny_chat();
        let config = ModelConfig::new("a", "a");
        let estimate = estimate(&header, &config, 2048);
        assert_eq!(split(&header, &estimate, 0), Split { host: estimate.total(), gpu: 0 });
        let half = split(&header, &estimate, 2);
        let all = split(&header, &estimate, 99);
        assert!(half.gpu > 0 && all.gpu > half.gpu && all.host < half.host);
        assert_eq!(half.host + half.gpu, estimate.total());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_says_what_is_free() {
        assert!(free().unwrap() > 1 << 20);
    }
}

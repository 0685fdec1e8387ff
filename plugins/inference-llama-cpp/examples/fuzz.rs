use inference_llama_cpp::{ModelConfig, engine::Engine, gguf::Header, memory};
fn main() {
    let path = std::env::args().nth(1).unwrap();
    for (parallel, chunk) in [(1, 128), (4, 128), (4, 512), (16, 64)] {
        let config = ModelConfig { threads: Some(1), parallel, prefill_chunk: chunk, ..ModelConfig::new("t", &path) };
        let header = Header::read(config.path.as_path()).unwrap();
        let e = memory::estimate(&header, &config, 2048);
        let engine = Engine::load(&config, |_| true).unwrap();
        println!("{parallel} {chunk}: {e:?} total {} actual {:?} rest {}", e.total(), engine.info().memory, engine.info().memory.unwrap() as i64 - (e.weights + e.cache) as i64);
    }
}

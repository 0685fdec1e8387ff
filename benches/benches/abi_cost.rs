//! What does the plugin boundary cost?
//!
//! Load: null calls one at a time and 32 in flight, a stream of 200,000 small items, a 1 MiB blob there and back, and the time from
//! dropping a stream until the plugin has its slot back. Compared, in turns and in one run: a bare channel between two runtimes (the
//! floor), the plugin linked statically, opened in this process, and in a worker process. The plugin is `inference-echo`.
//!
//! `make bench` runs it. With `-- --table` only the table of ratios is made, without criterion's own measurements.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use fabstir_benches::floor::Floor;
use fabstir_benches::table::{Rounds, bar, percentile};
use fabstir_benches::{Plugged, become_worker_if_asked, cx, generation, runtime, time_calls};
use fabstir_plugin_api::abi::Blob;

const ITEMS: u32 = 200_000;

struct Subjects {
    floor: Floor,
    plugged: [(&'static str, Arc<Plugged>); 3],
}

async fn subjects() -> Subjects {
    let config = serde_json::json!({ "parallel": 1024, "context": 4 * ITEMS });
    let linked = Plugged::linked(inference_echo::connect).configure(config.clone()).await;
    let in_process = Plugged::in_process("inference-echo").configure(config.clone()).await;
    let worker = Plugged::worker("inference-echo").configure(config).await;
    Subjects {
        floor: Floor::default(),
        plugged: [("linked", Arc::new(linked)), ("in process", Arc::new(in_process)), ("worker", Arc::new(worker))],
    }
}

const NAMES: [&str; 4] = ["channel (floor)", "linked", "in process", "worker"];

async fn null_calls(subjects: &Subjects, total: usize, in_flight: usize, rounds: usize) -> Rounds {
    let mut table = Rounds::new(format!("null call, {in_flight} in flight"), "us", &NAMES);
    for _ in 0..rounds {
        let pairs = |calls| {
            let mut pair = subjects.floor.pair();
            async move {
                for _ in 0..calls {
                    pair.ping().await;
                }
            }
        };
        table.add(0, time_calls(total, in_flight, pairs).await.as_secs_f64() * 1e6);
        for (index, (_, plugged)) in subjects.plugged.iter().enumerate() {
            let callers = |calls| {
                let plugin = plugged.plugin.clone();
                async move {
                    for _ in 0..calls {
                        plugin.health(&cx()).await.expect("answers");
                    }
                }
            };
            table.add(index + 1, time_calls(total, in_flight, callers).await.as_secs_f64() * 1e6);
        }
    }
    table.print();
    table
}

async fn stream_once(plugged: &Plugged, prompt: &str) -> Duration {
    let start = Instant::now();
    let mut stream = plugged.inference.generate(&cx(), generation("echo", prompt, None)).await.expect("begins");
    let mut items = 0;
    while let Some(item) = stream.next().await {
        item.expect("no error");
        items += 1;
    }
    assert_eq!(items, ITEMS + 1);
    start.elapsed()
}

async fn streams(subjects: &Subjects, rounds: usize) -> Rounds {
    let prompt = "w ".repeat(ITEMS as usize);
    let mut table = Rounds::new(format!("stream of {ITEMS} items"), "k items/s", &NAMES[1..]);
    for _ in 0..rounds {
        for (index, (_, plugged)) in subjects.plugged.iter().enumerate() {
            let plugged = plugged.clone();
            let prompt = prompt.clone();
            let time = tokio::spawn(async move { stream_once(&plugged, &prompt).await }).await.expect("no panic");
            table.add(index, f64::from(ITEMS) / time.as_secs_f64() / 1e3);
        }
    }
    table.print();
    table
}

/// The time that 1 MiB adds to a null call: the same bytes go there and back, so that only the boundary may copy them.
async fn blobs(subjects: &Subjects, rounds: usize) -> Rounds {
    let mut table = Rounds::new("1 MiB there and back, more than an empty blob", "us", &NAMES[1..]);
    for _ in 0..rounds {
        for (index, (name, plugged)) in subjects.plugged.iter().enumerate() {
            let plugin = plugged.plugin.clone();
            let calls = if *name == "worker" { 50 } else { 500 };
            let measured = tokio::spawn(async move {
                let (mut with, mut without) = (vec![], vec![]);
                let mut large = Blob::from(vec![7u8; 1 << 20]);
                for _ in 0..calls {
                    let start = Instant::now();
                    plugin.ping(&cx(), Blob::new()).await.expect("answers");
                    without.push(start.elapsed().as_secs_f64() * 1e6);
                    let start = Instant::now();
                    large = plugin.ping(&cx(), large).await.expect("answers");
                    with.push(start.elapsed().as_secs_f64() * 1e6);
                }
                percentile(&mut with, 0.5) - percentile(&mut without, 0.5)
            });
            table.add(index, measured.await.expect("no panic"));
        }
    }
    table.print();
    table
}

/// From dropping a stream until the plugin's only slot can be taken again: the cancel and one successful call.
async fn cancels(config: serde_json::Value, rounds: usize) -> [f64; 2] {
    let in_process = Plugged::in_process("inference-echo").configure(config.clone()).await;
    let worker = Plugged::worker("inference-echo").configure(config).await;
    let mut worst = [0.0; 2];
    println!("\ncancel of a stream until its slot is free ({rounds} times)");
    for (index, (name, plugged)) in [("in process", in_process), ("worker", worker)].into_iter().enumerate() {
        let times = tokio::spawn(async move {
            let mut times = vec![];
            let mut stream =
                Some(plugged.inference.generate(&cx(), generation("echo", "a b c", None)).await.expect("the slot is free"));
            for _ in 0..rounds {
                let start = Instant::now();
                drop(stream.take());
                while stream.is_none() {
                    stream = plugged.inference.generate(&cx(), generation("echo", "a b c", None)).await.ok();
                }
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
            times
        });
        let mut times = times.await.expect("no panic");
        let (p50, p99) = (percentile(&mut times, 0.5), percentile(&mut times, 0.99));
        println!("  {name:<24} p50 {p50:.0} us, p99 {p99:.0} us");
        worst[index] = p99;
    }
    worst
}

async fn table() {
    let subjects = subjects().await;
    let alone = null_calls(&subjects, 10_000, 1, 9).await;
    bar("in process / floor, one at a time", alone.ratio(2), 1.5, true);
    bar("worker, one at a time, us", alone.median(3), 60.0, true);
    let many = null_calls(&subjects, 320_000, 32, 9).await;
    bar("in process / floor, 32 in flight", many.ratio(2), 1.5, true);
    let streams = streams(&subjects, 7).await;
    bar("in process, k items/s", streams.median(1), 500.0, false);
    bar("worker, k items/s", streams.median(2), 150.0, false);
    let blobs = blobs(&subjects, 7).await;
    bar("1 MiB in process, us more", blobs.median(1), 1.0, true);
    let cancels = cancels(serde_json::json!({ "parallel": 1, "delay_ms": 60_000 }), 1000).await;
    bar("cancel in process, p99 us", cancels[0], 1000.0, true);
    bar("cancel in a worker, p99 us", cancels[1], 1000.0, true);
}

fn measure(criterion: &mut Criterion) {
    let runtime = runtime();
    let subjects = runtime.block_on(subjects());
    let mut group = criterion.benchmark_group("null_call");
    group.bench_function(NAMES[0], |bench| {
        bench.iter_custom(|calls| {
            let mut pair = subjects.floor.pair();
            runtime.block_on(async {
                let start = Instant::now();
                for _ in 0..calls {
                    pair.ping().await;
                }
                start.elapsed()
            })
        });
    });
    for (name, plugged) in &subjects.plugged {
        group.bench_function(*name, |bench| bench.to_async(&runtime).iter(|| async { plugged.plugin.health(&cx()).await }));
    }
    group.finish();
}

/// One candidate's calls for a while, with nothing beside them: for a profiler.
async fn profile(name: &str) {
    let subjects = subjects().await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(8) {
        let time = match subjects.plugged.iter().find(|(candidate, _)| *candidate == name) {
            None => {
                let pairs = |calls| {
                    let mut pair = subjects.floor.pair();
                    async move {
                        for _ in 0..calls {
                            pair.ping().await;
                        }
                    }
                };
                time_calls(500_000, 32, pairs).await
            }
            Some((_, plugged)) => {
                let callers = |calls| {
                    let plugin = plugged.plugin.clone();
                    async move {
                        for _ in 0..calls {
                            plugin.health(&cx()).await.expect("answers");
                        }
                    }
                };
                time_calls(500_000, 32, callers).await
            }
        };
        println!("{name}: {time:?} a call");
    }
}

fn main() {
    become_worker_if_asked();
    if let Some(name) = std::env::args().find_map(|argument| argument.strip_prefix("--profile=").map(str::to_owned)) {
        let name: &'static str = name.leak();
        return runtime().block_on(async { tokio::spawn(profile(name)).await.expect("no panic") });
    }
    runtime().block_on(async { tokio::spawn(table()).await.expect("no panic") });
    if !std::env::args().any(|argument| argument == "--table") {
        let mut criterion = Criterion::default().configure_from_args();
        measure(&mut criterion);
        criterion.final_summary();
    }
}

//! How long does it take to find the nearest of 100,000 vectors in storage-disk, and are they the nearest?
//!
//! Load: 100,000 vectors of 384 numbers in 2,000 clusters of 48 directions with some noise, which is as uneven as embeddings are, or those
//! of a file; 500 queries, half of them stored vectors a little changed, as a rephrased question is, half of them new. Ten are wanted.
//! Through the plugin boundary, in this process, one at a time. The floor is usearch, which storage-disk has inside, called directly on
//! the same vectors with the same settings; beside both a look at every vector. In one run, in turns of 25 queries: a look at every vector
//! goes through 150 MB, after which the next search finds nothing in the processor's caches. Recall is the share of the ten nearest, as the
//! look at every vector has them, that is found.
//!
//! `make bench` runs it; `cargo bench --package fabstir-benches --bench vectors -- --vectors=FILE --dimensions=384` takes the vectors of a
//! file: little-endian 32-bit floats, one vector after the other, the last 500 of them the queries.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fabstir_benches::table::{Rounds, bar, print_machine};
use fabstir_benches::{cx, library, runtime};
use fabstir_host::supervisor::Connected;
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::plugin::{Configure, Plugin};
use fabstir_plugin_api::storage::{Storage, Vector, VectorQuery};
use usearch::{Index, IndexOptions, MetricKind, ScalarKind};

const VECTORS: usize = 100_000;
const DIMENSIONS: usize = 384;
const CLUSTERS: usize = 2000;
const RANK: usize = 48;
const QUERIES: usize = 500;
const WANTED: usize = 10;
const BATCH: usize = 1000;
const TURN: usize = 25;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// About a normal distribution: the sum of twelve even ones.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32).sum::<f32>() - 6.0
    }

    fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }
}

fn unit(mut values: Vec<f32>) -> Vec<f32> {
    let length = dot(&values, &values).sqrt();
    values.iter_mut().for_each(|value| *value /= length);
    values
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0f32; 8];
    for (a, b) in a.iter().zip(b) {
        (0..8).for_each(|lane| sums[lane] += a[lane] * b[lane]);
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// What is searched, and what is looked for.
struct Workload {
    name: String,
    dimensions: usize,
    stored: Vec<Vec<f32>>,
    queries: Vec<Vec<f32>>,
}

impl Workload {
    fn synthetic() -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let basis: Vec<Vec<f32>> = (0..RANK).map(|_| random.normals(DIMENSIONS)).collect();
        // The first directions say more than the last ones.
        let weights: Vec<f32> = (0..RANK).map(|rank| 1.0 / (1.0 + rank as f32 / 8.0)).collect();
        let centres: Vec<Vec<f32>> = (0..CLUSTERS).map(|_| random.normals(RANK)).collect();
        let sample = |random: &mut Random| {
            let centre = &centres[random.next() as usize % CLUSTERS];
            let mut values: Vec<f32> = random.normals(DIMENSIONS).into_iter().map(|noise| 0.3 * noise).collect();
            for ((direction, weight), centre) in basis.iter().zip(&weights).zip(centre) {
                let by = weight * (centre + 0.5 * random.normal());
                values.iter_mut().zip(direction).for_each(|(value, direction)| *value += by * direction);
            }
            unit(values)
        };
        let stored: Vec<Vec<f32>> = (0..VECTORS).map(|_| sample(&mut random)).collect();
        let queries = (0..QUERIES)
            .map(|number| match number % 2 {
                0 => sample(&mut random),
                _ => {
                    let like = &stored[random.next() as usize % VECTORS];
                    unit(like.iter().map(|value| value + 0.1 * random.normal() / (DIMENSIONS as f32).sqrt()).collect())
                }
            })
            .collect();
        let name = format!("{VECTORS} synthetic vectors of {DIMENSIONS} numbers");
        Self { name, dimensions: DIMENSIONS, stored, queries }
    }

    fn of_file(path: &Path, dimensions: usize) -> Self {
        let bytes = std::fs::read(path).expect("the file of vectors can be read");
        let numbers: Vec<f32> = bytes.as_chunks().0.iter().map(|number| f32::from_le_bytes(*number)).collect();
        let mut stored: Vec<Vec<f32>> = numbers.chunks_exact(dimensions).map(|values| unit(values.to_vec())).collect();
        assert!(stored.len() > 2 * QUERIES, "the file has only {} vectors of {dimensions} numbers", stored.len());
        let queries = stored.split_off(stored.len() - QUERIES);
        Self { name: format!("{} vectors of {}", stored.len(), path.display()), dimensions, stored, queries }
    }

    fn floor(&self) -> Index {
        let options = IndexOptions {
            dimensions: self.dimensions,
            metric: MetricKind::IP,
            quantization: ScalarKind::BF16,
            connectivity: 16,
            expansion_add: 128,
            expansion_search: 112,
            multi: false,
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let index = Index::new(&options).expect("the options make sense");
        index.reserve_capacity_and_threads(self.stored.len(), threads).expect("there is memory");
        let share = self.stored.len().div_ceil(threads);
        std::thread::scope(|scope| {
            for (part, vectors) in self.stored.chunks(share).enumerate() {
                let index = &index;
                scope.spawn(move || {
                    for (number, values) in vectors.iter().enumerate() {
                        index.add((part * share + number) as u64, values).expect("there is room");
                    }
                });
            }
        });
        index
    }

    /// A look at every vector: the cosine of the last that is wanted.
    fn exact(&self, query: &[f32]) -> f32 {
        let mut all: Vec<f32> = self.stored.iter().map(|values| dot(query, values)).collect();
        *all.select_nth_unstable_by(WANTED - 1, |a, b| b.total_cmp(a)).1
    }

    /// How many of those found are among the nearest; what is as near as the last of them counts, too.
    fn hits(&self, query: &[f32], found: &[usize], least: f32) -> usize {
        found.iter().filter(|number| dot(query, &self.stored[**number]) >= least - 1e-6).count()
    }
}

async fn store(folder: &Path, workload: &Workload) -> (Arc<dyn Storage>, Connected) {
    let connected = Connected::in_process(&library("storage-disk"), "disk").expect("the plugin opens");
    let configure =
        Configure { instance: "disk".into(), state_dir: folder.to_owned(), config: "{}".into(), log_level: "error".into() };
    let plugin = <dyn Plugin as Interface>::client(connected.session.clone());
    plugin.configure(&cx(), configure).await.expect("the plugin takes its configuration");
    let storage = <dyn Storage as Interface>::client(connected.session.clone());
    let began = Instant::now();
    for (batch, vectors) in workload.stored.chunks(BATCH).enumerate() {
        let vectors = vectors.iter().enumerate().map(|(number, values)| Vector {
            key: (batch * BATCH + number).to_string(),
            values: values.clone(),
            data: vec![7; 64],
        });
        storage.vectors_put(&cx(), "bench".into(), vectors.collect()).await.expect("there is room");
    }
    println!("  {} stored in {:.1} s, {BATCH} at a time", workload.stored.len(), began.elapsed().as_secs_f64());
    // Until there is an index every row is looked at, which takes longer than anything here may.
    let mut fast = 0;
    while fast < 20 {
        let took = find(&*storage, &workload.queries[fast]).await.1;
        fast = if took < Duration::from_millis(10) { fast + 1 } else { 0 };
        if fast == 0 {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    println!("  indexed {:.1} s after the first was put", began.elapsed().as_secs_f64());
    (storage, connected)
}

async fn find(storage: &dyn Storage, values: &[f32]) -> (Vec<usize>, Duration) {
    let query = VectorQuery { values: values.to_vec(), limit: WANTED as u32, at_least: None };
    let began = Instant::now();
    let found = storage.vectors_find(&cx(), "bench".into(), query).await.expect("the plugin finds");
    let took = began.elapsed();
    (found.iter().map(|near| near.key.parse().expect("keys are numbers")).collect(), took)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn main() {
    let argument = |name: &str| std::env::args().find_map(|argument| argument.strip_prefix(name).map(str::to_owned));
    let dimensions = argument("--dimensions=").map_or(DIMENSIONS, |number| number.parse().expect("`--dimensions` is a number"));
    let workload = match argument("--vectors=") {
        Some(path) => Workload::of_file(Path::new(&path), dimensions),
        None => Workload::synthetic(),
    };
    // Where the node's data would be: a folder of the disk, not of memory.
    let folder = tempfile::tempdir_in(std::env::current_dir().expect("a folder")).expect("a folder can be made");
    print_machine();
    println!("  {}", workload.name);
    let floor = workload.floor();
    runtime().block_on(async {
        let (storage, _open) = store(folder.path(), &workload).await;
        let names = ["floor: usearch directly", "vectors_find", "a look at every vector"];
        let mut rounds = Rounds::new(format!("Finding the {WANTED} nearest"), "ms", &names);
        let (mut hits, mut floor_hits) = (0, 0);
        for queries in workload.queries.chunks(TURN) {
            let (mut direct, mut plugged) = (Vec::new(), Vec::new());
            for query in queries {
                let began = Instant::now();
                let found = floor.search(query, WANTED).expect("usearch finds");
                rounds.add(0, ms(began.elapsed()));
                direct.push(found.keys.iter().map(|key| *key as usize).collect::<Vec<_>>());
            }
            for query in queries {
                let (found, took) = find(&*storage, query).await;
                rounds.add(1, ms(took));
                plugged.push(found);
            }
            for ((query, direct), plugged) in queries.iter().zip(&direct).zip(&plugged) {
                let began = Instant::now();
                let least = workload.exact(query);
                rounds.add(2, ms(began.elapsed()));
                hits += workload.hits(query, plugged, least);
                floor_hits += workload.hits(query, direct, least);
            }
        }
        rounds.print();
        let due = (workload.queries.len() * WANTED) as f64;
        println!(
            "  p99 of vectors_find: {:.2} ms; recall of the floor: {:.4}",
            rounds.percentile(1, 0.99),
            floor_hits as f64 / due
        );
        bar("vectors_find, p50 in ms", rounds.median(1), 1.0, true);
        bar("recall of the 10 nearest", hits as f64 / due, 0.99, false);
    });
}

//! Results, as a table of medians and ratios.

/// The median of some measurements.
pub fn median(values: &mut [f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value below which a share `p` of the measurements lie.
pub fn percentile(values: &mut [f64], p: f64) -> f64 {
    assert!(!values.is_empty(), "nothing was measured");
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * p).round() as usize]
}

/// How far a median may be off, with about 95 % confidence: the notch of McGill, Tukey and Larsen, 1.57 times the distance between the
/// quartiles over the root of the number of values.
fn notch(values: &mut [f64]) -> f64 {
    let quartiles = percentile(values, 0.75) - percentile(values, 0.25);
    1.57 * quartiles / (values.len() as f64).sqrt()
}

/// Measurements of several candidates, taken in turns.
pub struct Rounds {
    title: String,
    unit: &'static str,
    names: Vec<&'static str>,
    /// One list per candidate.
    values: Vec<Vec<f64>>,
}

impl Rounds {
    /// The first candidate is what the others are compared with.
    pub fn new(title: impl Into<String>, unit: &'static str, names: &[&'static str]) -> Self {
        Self { title: title.into(), unit, names: names.to_vec(), values: vec![Vec::new(); names.len()] }
    }

    pub fn add(&mut self, candidate: usize, value: f64) {
        self.values[candidate].push(value);
    }

    pub fn median(&self, candidate: usize) -> f64 {
        median(&mut self.values[candidate].clone())
    }

    pub fn percentile(&self, candidate: usize, p: f64) -> f64 {
        percentile(&mut self.values[candidate].clone(), p)
    }

    /// Of each round, what a candidate and the first make together.
    fn pairs(&self, candidate: usize, make: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        self.values[candidate].iter().zip(&self.values[0]).map(|(value, first)| make(*value, *first)).collect()
    }

    fn ratios(&self, candidate: usize) -> Vec<f64> {
        self.pairs(candidate, |value, first| value / first)
    }

    /// The median over the rounds of a candidate's difference to the first in the same round, and how far it may be off.
    pub fn difference(&self, candidate: usize) -> (f64, f64) {
        let mut differences = self.pairs(candidate, |value, first| value - first);
        (median(&mut differences), notch(&mut differences))
    }

    /// The median over the rounds of a candidate's ratio to the first in the same round.
    pub fn ratio(&self, candidate: usize) -> f64 {
        median(&mut self.ratios(candidate))
    }

    /// How far the ratio may be off.
    pub fn ratio_error(&self, candidate: usize) -> f64 {
        notch(&mut self.ratios(candidate))
    }

    pub fn print(&self) {
        println!("\n{} ({} rounds in turns)", self.title, self.values[0].len());
        println!("  {:<24} {:>14} {:>14} {:>14} {:>8} {:>7}", "", "median", "least", "most", "ratio", "+-");
        for (index, name) in self.names.iter().enumerate() {
            let mut values = self.values[index].clone();
            let (least, most) = (percentile(&mut values, 0.0), percentile(&mut values, 1.0));
            let show = |value: f64| format!("{value:.2} {}", self.unit);
            println!(
                "  {name:<24} {:>14} {:>14} {:>14} {:>8.3} {:>7.3}",
                show(self.median(index)),
                show(least),
                show(most),
                self.ratio(index),
                self.ratio_error(index)
            );
        }
    }
}

/// Prints what the figures were taken on: cores and how busy they are.
pub fn print_machine() {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split_whitespace().take(3).collect();
    println!("\nmachine: {cores} cores, load average {}", load.join(" "));
}

/// Prints a bar of the project beside what was measured.
pub fn bar(what: &str, measured: f64, limit: f64, at_most: bool) {
    let met = if at_most { measured <= limit } else { measured >= limit };
    let sign = if at_most { "<=" } else { ">=" };
    println!("  bar: {what}: {measured:.3} {sign} {limit}: {}", if met { "met" } else { "NOT MET" });
}

//! Log-probabilities from raw logits.

/// The natural logarithm of the probability of `token`, and the `top` likeliest tokens with theirs, likeliest first.
pub fn logprobs(logits: &[f32], token: i32, top: usize) -> (f32, Vec<(i32, f32)>) {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
    let log_sum = most + sum.ln() as f32;
    let logprob = |token: i32| logits.get(token as usize).map_or(f32::NEG_INFINITY, |logit| logit - log_sum);

    let mut best: Vec<(i32, f32)> = Vec::with_capacity(top + 1);
    for (token, &logit) in (0i32..).zip(logits) {
        if top == 0 || (best.len() == top && best[top - 1].1 >= logit) {
            continue;
        }
        let place = best.partition_point(|&(_, other)| other >= logit);
        best.insert(place, (token, logit));
        best.truncate(top);
    }
    for (_, logit) in &mut best {
        *logit -= log_sum;
    }
    (logprob(token), best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_are_ordered() {
        let logits = [1.0, 3.0, 2.0, 3.0, -50.0];
        let (chosen, top) = logprobs(&logits, 2, 5);
        assert_eq!(top.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [1, 3, 2, 0, 4]);
        let sum: f32 = top.iter().map(|&(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        assert_eq!(chosen, top[2].1);
    }

    #[test]
    fn no_more_than_asked_for() {
        let logits = [1.0, 3.0, 2.0];
        assert_eq!(logprobs(&logits, 0, 2).1.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [1, 2]);
        assert!(logprobs(&logits, 0, 0).1.is_empty());
    }
}

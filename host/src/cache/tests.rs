//! What clients who ask for the same thing at the same time hear.

use fabstir_plugin_api::error::PluginError;

use super::*;
use crate::scheduler::tests::{Script, Step, request, route, scheduler};

struct Node {
    cache: Arc<Cache>,
    _folder: tempfile::TempDir,
}

fn node(script: Script) -> Node {
    let folder = tempfile::tempdir().expect("a folder");
    let (scheduler, _) = scheduler(8, [route("a", 1, "m", 1, script)]);
    let config = config::Cache { enabled: true, look_ms: 30_000, ..config::Cache::default() };
    let (_, routes) = watch::channel(Arc::default());
    let cache = Cache::open(&config, folder.path(), scheduler, routes).expect("it needs no key").expect("it is enabled");
    Node { cache, _folder: folder }
}

/// The text, and where it came from.
async fn ask(node: &Node, wish: Wish) -> Result<(String, Found), Refused> {
    let mut request = request("hello");
    request.sampling.temperature = 0.0;
    let mut telling = node.cache.answer(Cx::new(), request, wish).await?.expect("more than a kept answer was wanted");
    let mut text = String::new();
    while let Some(chunk) = telling.next().await {
        if let Chunk::Text(piece) = chunk? {
            text.push_str(&piece.text);
        }
    }
    Ok((text, telling.found))
}

#[tokio::test]
async fn what_fails_for_one_is_tried_again_for_another() {
    let node = node(Script::of([Step::Refuse(PluginError::internal("on purpose"))]));
    let (first, second) = tokio::join!(ask(&node, Wish::default()), ask(&node, Wish::default()));
    assert!(first.is_err());
    assert_eq!(second.expect("it has a try of its own"), ("ok".to_owned(), Found::Miss));
    assert!(matches!(ask(&node, Wish::default()).await.expect("an answer").1, Found::Kept { .. }));
}

#[tokio::test]
async fn what_breaks_off_is_told_to_all_and_kept_for_nobody() {
    let node = node(Script::of([Step::Break(&["half ", "an "], PluginError::internal("on purpose"))]));
    let (first, second) = tokio::join!(ask(&node, Wish::default()), ask(&node, Wish::default()));
    assert!(first.is_err() && second.is_err());
    assert_eq!(ask(&node, Wish::default()).await.expect("a new one").1, Found::Miss);
}

#[tokio::test]
async fn whoever_wants_it_anew_joins_nobody() {
    let node = node(Script { takes: Duration::from_millis(20), ..Script::default() });
    let anew = Wish { anew: true, ..Wish::default() };
    let (first, second, third) = tokio::join!(ask(&node, Wish::default()), ask(&node, anew), ask(&node, Wish::default()));
    let found = [first, second, third].map(|told| told.expect("an answer").1);
    assert_eq!(found, [Found::Miss, Found::Miss, Found::Joined]);
}

//! The pool against servers that are down, slow, wrong, behind or of another chain.

mod server;

use ethers::providers::{Middleware, Provider, ProviderError, RpcError};

use super::*;
use server::{Reply, Server};

const CHAIN: u64 = 8453;

type Way = fn() -> Reply;

/// What a good endpoint says, at block `head`.
fn good(head: u64) -> impl Fn(&str) -> Reply {
    move |method| match method {
        "eth_chainId" => Reply::Result(json!("0x2105")),
        "eth_blockNumber" => Reply::Result(json!(format!("{head:#x}"))),
        "eth_gasPrice" => Reply::Result(json!("0x7")),
        _ => Reply::Result(Value::Null),
    }
}

/// A good endpoint but for one method.
fn but(method: &'static str, reply: impl Fn() -> Reply + Send + Sync + 'static) -> impl Fn(&str) -> Reply + Send + Sync {
    move |asked| if asked == method { reply() } else { good(100)(asked) }
}

fn pool_with(servers: &[&Server], limits: Limits) -> Pool {
    Pool::new(&servers.iter().map(|server| server.url()).collect::<Vec<_>>(), CHAIN, limits).unwrap()
}

fn pool(servers: &[&Server]) -> Pool {
    pool_with(servers, Limits::default())
}

async fn gas_price(client: &impl JsonRpcClient<Error = CallError>) -> Result<String, CallError> {
    client.request("eth_gasPrice", ()).await
}

#[test]
fn urls_that_cannot_be_used_are_refused_without_being_shown() {
    let refused = |urls: &[&str]| Pool::new(urls, CHAIN, Limits::default()).unwrap_err();
    assert_eq!(refused(&[]), UrlError::None);
    let ws = refused(&["https://a.example", "wss://b.example/secret-key"]);
    assert_eq!(ws, UrlError::Scheme { place: 2, scheme: "wss".into() });
    assert!(ws.to_string().contains("only http:// and https:// are supported"), "{ws}");
    let none = refused(&["b.example/secret-key"]);
    assert!(matches!(none, UrlError::Url { place: 1, .. }) && !none.to_string().contains("secret"), "{none}");
}

#[tokio::test]
async fn a_pool_starts_without_an_endpoint_and_works_once_there_is_one() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let pool = Pool::new(&[format!("http://user:password@{at}/secret-key")], CHAIN, Limits::default()).unwrap();
    let error = gas_price(&pool).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, CallError::Unreachable { .. }) && text.contains(&at.to_string()), "{error}");
    assert!(
        !format!("{text} {pool:?}").contains("secret") && !format!("{text} {pool:?}").contains("password"),
        "{text} {pool:?}"
    );

    let _server = Server::start_at(at, good(100)).await;
    assert_eq!(gas_price(&pool).await.unwrap(), "0x7");
}

#[tokio::test]
async fn an_endpoint_that_fails_in_any_way_is_passed_over() {
    let ways: [(&str, Way); 9] = [
        ("cut off", || Reply::CutOff),
        ("garbage", || Reply::Http("200 OK", "", "<html>gateway</html>".into())),
        ("no object", || Reply::Http("200 OK", "", "[]".into())),
        ("nothing in it", || Reply::Http("200 OK", "", "{}".into())),
        ("wrong id", || Reply::WrongId),
        ("wrong form", || Reply::Result(json!({ "price": 7 }))),
        ("server error", || Reply::Http("502 Bad Gateway", "", "oops".into())),
        ("behind", || Reply::Error(-32000, "header not found")),
        ("busy", || Reply::Error(-32005, "limit exceeded")),
    ];
    for (way, reply) in ways {
        let (bad, well) = (Server::start(but("eth_gasPrice", reply)).await, Server::start(good(100)).await);
        assert_eq!(gas_price(&pool(&[&bad, &well])).await.unwrap(), "0x7", "{way}");
        assert_eq!((bad.times("eth_gasPrice"), well.times("eth_gasPrice")), (1, 1), "{way}");
    }
}

#[tokio::test]
async fn what_is_no_answer_is_said_to_be_none() {
    let ways: [(Way, &str); 4] = [
        (|| Reply::Http("200 OK", "", "garbage".into()), "not JSON"),
        (|| Reply::WrongId, "the id 999999 instead of"),
        (|| Reply::Http("200 OK", "", r#"{"jsonrpc":"2.0","id":2}"#.into()), "neither a result nor an error"),
        (|| Reply::Flood(3 << 20), "more than 1048576 bytes"),
    ];
    for (reply, says) in ways {
        let server = Server::start(but("eth_gasPrice", reply)).await;
        let error = gas_price(&pool_with(&[&server], Limits { longest_answer: 1 << 20, ..Limits::default() })).await.unwrap_err();
        assert!(matches!(&error, CallError::Malformed { why, .. } if why.contains(says)), "{error}");
    }
}

#[tokio::test]
async fn an_endpoint_that_hangs_costs_one_try_and_then_waits_at_the_end() {
    let (hangs, well) = (Server::start(but("eth_gasPrice", || Reply::Never)).await, Server::start(good(100)).await);
    let limits = Limits { per_try: Duration::from_secs(1), ..Limits::default() };
    let pool = pool_with(&[&hangs, &well], limits);
    for _ in 0..5 {
        assert_eq!(gas_price(&pool).await.unwrap(), "0x7");
    }
    assert_eq!((hangs.times("eth_gasPrice"), well.times("eth_gasPrice")), (1, 5));

    let alone = pool_with(&[&hangs], Limits { total: Duration::from_millis(300), ..limits });
    let began = Instant::now();
    let error = gas_price(&alone).await.unwrap_err();
    assert!(matches!(&error, CallError::Unreachable { why } if why.contains("no answer within 0.")), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_endpoint_that_wants_fewer_requests_is_left_alone() {
    let full = || Reply::Http("429 Too Many Requests", "retry-after: 120\r\n", String::new());
    let (busy, well) = (Server::start(but("eth_gasPrice", full)).await, Server::start(good(100)).await);
    let both = pool(&[&busy, &well]);
    for _ in 0..5 {
        assert_eq!(gas_price(&both).await.unwrap(), "0x7");
    }
    assert_eq!(busy.times("eth_gasPrice"), 1);

    let alone = pool(&[&busy]);
    for _ in 0..2 {
        let error = gas_price(&alone).await.unwrap_err();
        let CallError::RateLimited { retry_after } = error else { panic!("{error}") };
        assert!((110..=120).contains(&retry_after.as_secs()), "{retry_after:?}");
    }
    assert_eq!(busy.times("eth_gasPrice"), 2, "asked once for each pool");
}

#[tokio::test]
async fn an_endpoint_of_another_chain_is_never_used() {
    let other =
        Server::start(|method| if method == "eth_chainId" { Reply::Result(json!("0x1")) } else { good(900)(method) }).await;
    let error = gas_price(&pool(&[&other])).await.unwrap_err();
    assert!(matches!(error, CallError::WrongChain { expected: CHAIN, found: 1 }), "{error}");

    let well = Server::start(good(100)).await;
    let both = pool(&[&other, &well]);
    assert_eq!(gas_price(&both).await.unwrap(), "0x7");
    let _: Value = both.request("eth_sendRawTransaction", ["0x00"]).await.unwrap();
    assert_eq!(both.pinned().await.unwrap().endpoint(), format!("http://{}", well.at));
    assert_eq!(*other.asked.lock(), ["eth_chainId", "eth_chainId"], "asked by each pool, and for nothing else");
}

#[tokio::test]
async fn the_chain_is_asked_for_again_after_a_failure() {
    let server = Server::start(good(100)).await;
    let at = server.at;
    let pool = pool(&[&server]);
    gas_price(&pool).await.unwrap();
    gas_price(&pool).await.unwrap();
    assert_eq!(server.times("eth_chainId"), 1);
    drop(server);
    assert!(gas_price(&pool).await.is_err());
    let other =
        Server::start_at(at, |method| if method == "eth_chainId" { Reply::Result(json!("0x1")) } else { good(900)(method) })
            .await;
    assert!(matches!(gas_price(&pool).await, Err(CallError::WrongChain { .. })));
    assert_eq!(other.times("eth_gasPrice"), 0);
}

#[tokio::test]
async fn an_endpoint_that_does_not_say_its_chain_answers_nothing() {
    let locked = Server::start(|_| Reply::Error(-32000, "must be authenticated")).await;
    let error = gas_price(&pool(&[&locked])).await.unwrap_err();
    assert!(matches!(&error, CallError::Unreachable { why } if why.contains("must be authenticated")), "{error}");
}

#[tokio::test]
async fn an_endpoint_that_lags_is_used_last() {
    for (behind, uses) in [(5, (1, 0)), (6, (0, 1))] {
        let (first, second) = (Server::start(good(100 - behind)).await, Server::start(good(100)).await);
        let pool = pool(&[&first, &second]);
        gas_price(&pool).await.unwrap();
        assert_eq!((first.times("eth_gasPrice"), second.times("eth_gasPrice")), uses, "{behind} blocks behind");
    }
    let (lags, fails) = (Server::start(good(10)).await, Server::start(but("eth_gasPrice", || Reply::CutOff)).await);
    assert_eq!(gas_price(&pool(&[&lags, &fails])).await.unwrap(), "0x7");
}

#[tokio::test]
async fn an_endpoint_that_has_recovered_is_preferred_again() {
    let down = Arc::new(Mutex::new(true));
    let state = down.clone();
    let first = Server::start(move |method| if *state.lock() { Reply::CutOff } else { good(100)(method) }).await;
    let second = Server::start(good(100)).await;
    let pool = pool_with(&[&first, &second], Limits { compare_every: Duration::ZERO, ..Limits::default() });
    gas_price(&pool).await.unwrap();
    *down.lock() = false;
    // Its backoff has to be over before it is looked at again.
    while first.times("eth_gasPrice") == 0 {
        gas_price(&pool).await.unwrap();
    }
    let before = second.times("eth_gasPrice");
    gas_price(&pool).await.unwrap();
    assert_eq!(second.times("eth_gasPrice"), before);
}

#[tokio::test]
async fn what_the_chain_answers_is_passed_on_and_held_against_nobody() {
    let reverts = || Reply::Error(3, "execution reverted: NotOwner");
    let (first, second) = (Server::start(but("eth_call", reverts)).await, Server::start(good(100)).await);
    let pool = pool(&[&first, &second]);
    let error = pool.request::<_, Value>("eth_call", json!([{}])).await.unwrap_err();
    assert_eq!(error.as_error_response().map(|error| error.code), Some(3));
    let error = ProviderError::from(error);
    assert!(matches!(CallError::of(&error), Some(CallError::Rpc(answer)) if answer.is_revert()), "{error}");
    assert_eq!(second.times("eth_call"), 0);
    gas_price(&pool).await.unwrap();
    assert_eq!(first.times("eth_gasPrice"), 1);
}

#[tokio::test]
async fn a_transaction_goes_to_all_and_one_that_takes_it_is_enough() {
    let send = "eth_sendRawTransaction";
    let hash = json!(format!("{:#066x}", 5));
    let taken = hash.clone();
    let takes = Server::start(but(send, move || Reply::Result(taken.clone()))).await;
    let refuses = Server::start(but(send, || Reply::Error(-32000, "nonce too low"))).await;
    let hangs = Server::start(but(send, || Reply::Never)).await;
    let pool = pool(&[&refuses, &hangs, &takes]);
    let began = Instant::now();
    assert_eq!(pool.request::<_, Value>(send, ["0x00"]).await.unwrap(), hash);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!([&refuses, &hangs, &takes].map(|server| server.times(send)), [1, 1, 1]);
}

#[tokio::test]
async fn a_transaction_that_nobody_takes_is_refused_with_the_chains_own_words() {
    let send = "eth_sendRawTransaction";
    let down = Server::start(but(send, || Reply::CutOff)).await;
    let low = Server::start(but(send, || Reply::Error(-32000, "nonce too low"))).await;
    let known = Server::start(but(send, || Reply::Error(-32010, "already known"))).await;
    for (servers, code, says) in
        [(vec![&down, &low], -32000, "nonce too low"), (vec![&low, &down, &known], -32010, "already known")]
    {
        let error = pool(&servers).request::<_, Value>(send, ["0x00"]).await.unwrap_err();
        let CallError::Rpc(error) = error else { panic!("{error}") };
        assert_eq!((error.code, error.message.as_str()), (code, says));
    }
}

#[tokio::test]
async fn a_pinned_round_stays_with_its_endpoint_and_the_next_one_goes_elsewhere() {
    let (first, second) = (Server::start(but("eth_getLogs", || Reply::CutOff)).await, Server::start(good(100)).await);
    let pool = pool(&[&first, &second]);
    let round = pool.pinned().await.unwrap();
    assert_eq!(gas_price(&round).await.unwrap(), "0x7");
    let error = round.request::<_, Value>("eth_getLogs", json!([{}])).await.unwrap_err();
    assert!(matches!(&error, CallError::Unreachable { why } if why.starts_with(round.endpoint())), "{error}");
    assert!(gas_price(&round).await.is_ok());
    let next = pool.pinned().await.unwrap();
    // It has answered since, so it is as good as before.
    assert_eq!(next.endpoint(), round.endpoint());
    next.request::<_, Value>("eth_getLogs", json!([{}])).await.unwrap_err();
    let next = pool.pinned().await.unwrap();
    assert_eq!(next.endpoint(), format!("http://{}", second.at));
    assert!(next.request::<_, Value>("eth_getLogs", json!([{}])).await.unwrap().is_null());
}

#[tokio::test]
async fn ethers_speaks_through_a_pool() {
    let server = Server::start(good(100)).await;
    let provider = Provider::new(pool(&[&server]));
    assert_eq!(provider.get_block_number().await.unwrap().as_u64(), 100);
    assert!(provider.get_block(7).await.unwrap().is_none());
}

//! Conversations.

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::*;
use crate::process;
use crate::report::Outcome;

/// Bytes that are the same in every run and differ from message to message.
fn words(number: usize, length: usize) -> Blob {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes.into()
}

pub async fn conversation_round_trip(harness: &Harness) -> Result<Outcome> {
    let (first, second) = Node::pair(harness).await?;
    let Talk { opener: (ask, mut answers), acceptor: (answer, mut asked) } = talk(&second, &first, 8).await?;
    for number in 0..1000 {
        ask.send(words(number, 1 + number % 500)).await.during("sending")?;
        ensure!(hear(&mut asked).await? == words(number, 1 + number % 500), "message {number} is another at the acceptor");
        answer.send(words(number + 1, 40)).await.during("answering")?;
        ensure!(hear(&mut answers).await? == words(number + 1, 40), "message {number} is another at the opener");
    }
    // Many at once, in both directions at the same time.
    let (one, other) = (ask.clone(), answer.clone());
    let send = async {
        for number in 0..5000 {
            one.send(words(number, 48)).await.during("sending")?;
        }
        anyhow::Ok(())
    };
    let reply = async {
        for number in 0..5000 {
            other.send(words(number, 48)).await.during("answering")?;
        }
        anyhow::Ok(())
    };
    let hear_both = async {
        for number in 0..5000 {
            ensure!(hear(&mut asked).await? == words(number, 48), "message {number} of many is another at the acceptor");
            ensure!(hear(&mut answers).await? == words(number, 48), "message {number} of many is another at the opener");
        }
        Ok(())
    };
    tokio::try_join!(send, reply, hear_both)?;
    drop((ask, one, answer, other));
    tokio::try_join!(hear_end(&mut asked), hear_end(&mut answers))?;
    Ok(Outcome::Pass)
}

pub async fn messages_keep_their_bounds(harness: &Harness) -> Result<Outcome> {
    let (first, second) = Node::pair(harness).await?;
    let Talk { opener: (ask, mut answers), acceptor: (answer, mut asked) } = talk(&second, &first, 4).await?;
    let sizes = [1, 2, 127, 128, 129, 16_383, 16_384, 65_535, 65_536, 65_537, 100_000, MESSAGE - 1, MESSAGE, 1, MESSAGE, 3];
    let send = async {
        for (number, size) in sizes.iter().enumerate() {
            ask.send(words(number, *size)).await.during("sending")?;
        }
        anyhow::Ok(())
    };
    let hear_all = async {
        for (number, size) in sizes.iter().enumerate() {
            let message = hear(&mut asked).await?;
            ensure!(message == words(number, *size), "a message of {size} bytes came as another one of {}", message.len());
        }
        Ok(())
    };
    tokio::try_join!(send, hear_all)?;
    drop(ask);
    hear_end(&mut asked).await?;
    drop(answer);
    hear_end(&mut answers).await?;

    for size in [0, MESSAGE + 1] {
        let Talk { opener: (ask, mut answers), acceptor: (_answer, mut asked) } = talk(&second, &first, 4).await?;
        ask.send(words(0, 10)).await.during("sending")?;
        hear(&mut asked).await?;
        ask.send(words(0, size)).await.during("sending")?;
        let error = hear_break(&mut answers).await.with_context(|| format!("after a message of {size} bytes"))?;
        ensure!(error.code == Code::InvalidArgument, "a message of {size} bytes ended its sender's side with `{}`", told(&error));
        let error = hear_break(&mut asked).await.with_context(|| format!("after a message of {size} bytes"))?;
        ensure!(error.code == Code::Unavailable, "a message of {size} bytes ended the other side with `{}`", told(&error));
    }
    Ok(Outcome::Pass)
}

pub async fn half_close(harness: &Harness) -> Result<Outcome> {
    let (first, second) = Node::pair(harness).await?;
    // The one that asks ends first, and the one that answers.
    for opener_first in [true, false] {
        let Talk { opener, acceptor } = talk(&second, &first, 4).await?;
        let (ends, goes_on) = if opener_first { (opener, acceptor) } else { (acceptor, opener) };
        let ((said_all, mut hears), (says, mut heard_all)) = (ends, goes_on);
        said_all.send(words(0, 100)).await.during("sending")?;
        drop(said_all);
        ensure!(hear(&mut heard_all).await? == words(0, 100), "the last message before the end is another");
        hear_end(&mut heard_all).await?;
        drop(heard_all);
        for number in 0..200 {
            says.send(words(number, 5000)).await.during("sending after the other direction had ended")?;
            ensure!(hear(&mut hears).await? == words(number, 5000), "a message after the other direction's end is another");
        }
        drop(says);
        hear_end(&mut hears).await?;
    }
    // A conversation in which nothing is said.
    let Talk { opener: (ask, mut answers), acceptor: (answer, mut asked) } = talk(&second, &first, 4).await?;
    drop((ask, answer));
    hear_end(&mut answers).await?;
    hear_end(&mut asked).await?;
    for node in [&first, &second] {
        node.instance.drain(SOON).await.context("after conversations that ended well")?;
    }
    Ok(Outcome::Pass)
}

pub async fn drop_gives_up(harness: &Harness) -> Result<Outcome> {
    let (first, second) = Node::pair(harness).await?;
    for opener_leaves in [true, false] {
        for by_error in [true, false] {
            let how = if by_error { "an error" } else { "a dropped stream" };
            let Talk { opener, acceptor } = talk(&second, &first, 4).await?;
            let (leaves, stays) = if opener_leaves { (opener, acceptor) } else { (acceptor, opener) };
            let ((leaver_says, mut leaver_hears), (stayer_says, mut stayer_hears)) = (leaves, stays);
            leaver_says.send(words(0, 10)).await.during("sending")?;
            hear(&mut stayer_hears).await?;
            stayer_says.send(words(1, 10)).await.during("sending")?;
            hear(&mut leaver_hears).await?;
            let kept = if by_error {
                leaver_says.clone().fail(PluginError::cancelled()).await;
                Some((leaver_says, leaver_hears))
            } else {
                drop(leaver_hears);
                // What this side may still say does not keep the conversation.
                drop(leaver_says);
                None
            };
            let error = hear_break(&mut stayer_hears).await.with_context(|| format!("after {how}"))?;
            ensure!(error.code == Code::Unavailable, "{how} ended the other side with `{}`", told(&error));
            let stopped = tokio::time::timeout(SOON, stayer_says.closed()).await;
            stopped.with_context(|| format!("after {how}, the other side's sender was not told to stop"))?;
            if let Some((_, mut hears)) = kept {
                hear_break(&mut hears).await.context("the side that gave up with an error")?;
            }
        }
    }
    // The connection goes, and all conversations with it.
    let Talk { opener: (_ask, mut answers), acceptor: (_answer, _asked) } = talk(&second, &first, 4).await?;
    first.instance.shutdown().await?;
    let error = hear_break(&mut answers).await.context("after the other node's end")?;
    ensure!(error.code == Code::Unavailable, "the other node's end ended a conversation with `{}`", told(&error));
    second.instance.drain(SOON).await.context("after conversations that were given up")?;
    Ok(Outcome::Pass)
}

pub async fn slow_peer_holds_back(harness: &Harness) -> Result<Outcome> {
    const PIECE: usize = 64 << 10;
    const ALLOWED: u64 = 24 << 20;
    let (first, second) = Node::pair(harness).await?;
    exercise(harness, &first.instance).await?;
    process::give_back_memory();
    let Ok(before) = process::resident() else { return Ok(Outcome::skip("this system does not tell a process's memory")) };

    let Talk { opener: (ask, mut answers), acceptor: (answer, mut asked) } = talk(&second, &first, 1).await?;
    let mut said = 0;
    while let Ok(sent) = tokio::time::timeout(Duration::from_secs(1), ask.send(words(said, PIECE))).await {
        sent.during("sending")?;
        said += 1;
        ensure!(said * PIECE < 256 << 20, "{} were taken for a peer that reads nothing", process::mib((said * PIECE) as u64));
    }
    let grown = process::resident()?.saturating_sub(before);
    let (taken, grown_mib) = (process::mib((said * PIECE) as u64), process::mib(grown));
    ensure!(grown < ALLOWED, "memory grew by {grown_mib} for a peer that reads nothing, {taken} were taken");
    eprintln!("{taken} were taken for a peer that reads nothing, memory grew by {grown_mib}");

    // Others go on meanwhile, and so does the other direction.
    answer.send(words(7, 100)).await.during("answering")?;
    ensure!(hear(&mut answers).await? == words(7, 100), "the other direction carries another message");
    let Talk { opener: (other_ask, _answers), acceptor: (_answer, mut other_asked) } = talk(&second, &first, 1).await?;
    other_ask.send(words(8, 100)).await.during("sending beside a peer that reads nothing")?;
    ensure!(hear(&mut other_asked).await? == words(8, 100), "another conversation carries another message");

    // Once it reads, all of it comes. The message that was being sent when time was up was not taken.
    for number in 0..said {
        ensure!(hear(&mut asked).await? == words(number, PIECE), "message {number} of {said} is another after a pause");
    }
    drop(ask);
    hear_end(&mut asked).await?;
    Ok(Outcome::Pass)
}

pub async fn busy_is_told(harness: &Harness) -> Result<Outcome> {
    const MANY: usize = 200;
    let (first, second) = Node::pair(harness).await?;
    let protocol = unique("/check/busy");
    let mut arrivals = first.listen(&protocol).await?;
    let began = Instant::now();
    let open = async || second.open(&first, &protocol, Stream::from_items([])).await.err().map(|error| (error, began.elapsed()));
    let mut opened: FuturesUnordered<_> = (0..MANY).map(|_| open()).collect();
    let (mut at_once, mut after_waiting) = (0, 0);
    while let Some(answer) = opened.next().await {
        let Some((error, after)) = answer else { bail!("a conversation began that nobody accepted") };
        ensure!(error.code == Code::Overloaded, "a conversation that nobody accepts ended with `{}`", told(&error));
        if after < Duration::from_secs(8) { at_once += 1 } else { after_waiting += 1 }
    }
    let took = began.elapsed();
    ensure!(took > Duration::from_secs(9), "conversations that nobody accepts are refused after {took:?}, 10 s are promised");
    ensure!(after_waiting > 0, "no conversation waited to be accepted");
    eprintln!("{at_once} refused at once, {after_waiting} after 10 s");

    // Those that waited were told of, and cannot be accepted any more.
    for _ in 0..after_waiting {
        let late = next_arrival(&mut arrivals).await?;
        let accepted = first.transport.accept(&patient(), late.id, Stream::from_items([])).await;
        refused("accept after 10 s", accepted, &[Code::NotFound])?;
    }
    refused(
        "accept of a number never given",
        first.transport.accept(&patient(), u64::MAX, Stream::from_items([])).await,
        &[Code::NotFound],
    )?;
    // Then there is room again, once for each.
    let opening = second.open(&first, &protocol, Stream::from_items([]));
    let accepting = async {
        let arrival = next_arrival(&mut arrivals).await?;
        let accepted = first.transport.accept(&patient(), arrival.id, Stream::from_items([])).await.during("accept")?;
        let again = first.transport.accept(&patient(), arrival.id, Stream::from_items([])).await;
        refused("a second accept of the same", again, &[Code::NotFound])?;
        anyhow::Ok(accepted)
    };
    let (opened, accepted) = tokio::join!(opening, accepting);
    hear_end(&mut opened.during("open after others were refused")?).await?;
    hear_end(&mut accepted?).await?;

    // A peer that gives up while it waits is not there to be accepted.
    let waiting = {
        let opening = second.open(&first, &protocol, Stream::from_items([]));
        tokio::select! {
            _ = opening => bail!("a conversation ended that nobody had accepted"),
            arrival = next_arrival(&mut arrivals) => arrival?,
        }
    };
    until("a conversation whose opener has gone is no longer there", async || {
        let accepted = first.transport.accept(&patient(), waiting.id, Stream::from_items([])).await;
        match accepted {
            Err(error) if error.code == Code::NotFound => Ok(true),
            Err(error) => bail!("accept of a conversation whose opener has gone: {}", told(&error)),
            // Accepted at the very moment: then it is broken, and gone the next time.
            Ok(_) => Ok(false),
        }
    })
    .await?;
    Ok(Outcome::Pass)
}

pub async fn unknown_protocol_is_unimplemented(harness: &Harness) -> Result<Outcome> {
    let (first, second) = Node::pair(harness).await?;
    let what = "a conversation of a protocol that nobody listens for";
    refused(what, second.open(&first, "/check/unknown", Stream::from_items([])).await, &[Code::Unimplemented])?;

    let arrivals = first.listen("/check/known").await?;
    invalid("a second listener", first.transport.listen(&patient(), "/check/known".into()).await)?;
    for name in ["", "check", "check/1"] {
        invalid(&format!("listen for {name:?}"), first.transport.listen(&patient(), name.into()).await)?;
        invalid(&format!("open of {name:?}"), second.open(&first, name, Stream::from_items([])).await)?;
    }
    drop(arrivals);
    until("a protocol is unknown again when its listener has gone", async || {
        let open = second.open(&first, "/check/known", Stream::from_items([]));
        match tokio::time::timeout(Duration::from_secs(1), open).await {
            // It came before the listener's end, and may wait to be accepted for longer than this check.
            Err(_) => Ok(false),
            Ok(Err(error)) if error.code == Code::Unimplemented => Ok(true),
            Ok(Err(error)) if error.code == Code::Overloaded => Ok(false),
            Ok(Err(error)) => bail!("open: {}", told(&error)),
            Ok(Ok(_)) => bail!("a conversation began that nobody accepted"),
        }
    })
    .await?;
    let _again = first.listen("/check/known").await?;
    Ok(Outcome::Pass)
}

pub async fn many_conversations(harness: &Harness) -> Result<Outcome> {
    const MANY: usize = 100;
    const MESSAGES: usize = 50;
    let (first, second) = Node::pair(harness).await?;
    let protocol = unique("/check/many");
    let arrivals = first.listen(&protocol).await?;
    let _echo = Echo::start(first.transport.clone(), arrivals);
    let began = Instant::now();
    let talks = (0..MANY).map(|number| {
        let to = Destination { peer: first.id.clone(), addresses: vec![], protocol: protocol.clone() };
        let transport = second.transport.clone();
        async move {
            let said: Vec<Blob> = (0..MESSAGES).map(|part| words(number * MESSAGES + part, 1 + 37 * part)).collect();
            let back = asked(&*transport, to, said.clone()).await?;
            ensure!(back == said, "conversation {number} got other messages back, or {} of {MESSAGES}", back.len());
            Ok(())
        }
    });
    futures::future::try_join_all(talks).await?;
    eprintln!("{MANY} conversations at once, {MESSAGES} messages each way: {:?}", began.elapsed());
    for node in [&first, &second] {
        node.instance.answers().await?;
    }
    Ok(Outcome::Pass)
}

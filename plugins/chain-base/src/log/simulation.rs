//! A chain that grows, is taken back and answers badly, all from a seed; and someone who follows it through a [`Reader`].

use futures::executor::block_on;
use parking_lot::Mutex;

use super::*;

/// SplitMix64: the same seed is the same schedule on every machine.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// How often things happen to the chain and its endpoint: once in so many calls.
#[derive(Clone, Copy)]
struct Weather {
    reorg: u64,
    deepest: u64,
    growth: u64,
    fault: u64,
    /// Blocks that the endpoint answers about at once, and logs.
    widest: u64,
    /// Logs: one in so many blocks has one, and of those one in as many has a second.
    sparse: u64,
}

struct Chain {
    dice: Dice,
    weather: Weather,
    blocks: Vec<(Header, Vec<Log>)>,
    /// Blocks made so far, those that were taken back included: no hash comes twice.
    made: u64,
    calm: bool,
    calls: u64,
}

impl Chain {
    fn grow(&mut self) {
        self.made += 1;
        let number = self.blocks.len() as u64;
        let mut hash = Hash::default();
        hash[..8].copy_from_slice(&self.made.to_be_bytes());
        let parent = self.blocks.last().map_or(Hash::default(), |(header, _)| header.hash);
        let mut logs = Vec::new();
        let mut index = self.dice.below(4);
        while self.dice.one_in(self.weather.sparse) {
            let tx_hash = [self.dice.next() as u8; 32];
            let (topics, data) = (vec![hash], vec![index as u8]);
            logs.push(Log {
                block_number: number,
                block_hash: hash,
                index,
                address: [7; 20],
                topics,
                data,
                tx_hash,
                removed: false,
            });
            index += 1 + self.dice.below(3);
        }
        self.blocks.push((Header { number, hash, parent, time_s: 1_000 + 2 * self.made }, logs));
    }

    fn head(&self) -> Point {
        self.blocks.last().expect("a chain begins with a block").0.point()
    }

    /// What may happen before a call is answered. `Err`: it is not answered.
    fn weather(&mut self) -> Result<(), SourceError> {
        self.calls += 1;
        if self.calm {
            return Ok(());
        }
        if self.dice.one_in(self.weather.growth) {
            for _ in 0..=self.dice.below(4) {
                self.grow();
            }
        }
        if self.dice.one_in(self.weather.reorg) {
            // Short ones come more often, as they do.
            let about = 1 << self.dice.below(7);
            let depth = 1 + self.dice.below(self.weather.deepest.min(about));
            let kept = (self.blocks.len() as u64).saturating_sub(depth).max(1);
            self.blocks.truncate(kept as usize);
            // Mostly the other fork is the longer one; now and then it takes a while to become so.
            for _ in 0..depth + self.dice.below(4) {
                if !self.dice.one_in(12) {
                    self.grow();
                }
            }
        }
        if self.dice.one_in(self.weather.fault) {
            return Err(SourceError::Failed("the connection was closed".into()));
        }
        Ok(())
    }

    fn events(&self, first: u64) -> Vec<(u64, Hash, u64)> {
        self.blocks.iter().skip(first as usize).flat_map(|(_, logs)| logs).map(key).collect()
    }
}

fn key(log: &Log) -> (u64, Hash, u64) {
    (log.block_number, log.block_hash, log.index)
}

/// An endpoint of the chain, with the faults of endpoints that say so.
struct Endpoint(Mutex<Chain>);

#[async_trait]
impl Source for Endpoint {
    async fn head(&self) -> Result<Point, SourceError> {
        let mut chain = self.0.lock();
        chain.weather()?;
        Ok(chain.head())
    }

    async fn block(&self, number: u64) -> Result<Option<Header>, SourceError> {
        let mut chain = self.0.lock();
        chain.weather()?;
        if !chain.calm && chain.dice.one_in(80) {
            return Ok(None);
        }
        Ok(chain.blocks.get(number as usize).map(|(header, _)| *header))
    }

    async fn logs(&self, from: u64, to: u64) -> Result<Vec<Log>, SourceError> {
        let mut chain = self.0.lock();
        chain.weather()?;
        if to - from >= chain.weather.widest {
            return Err(SourceError::TooLarge("query returned more than 10000 results".into()));
        }
        let mut logs: Vec<Log> =
            chain.blocks.iter().skip(from as usize).take((to - from + 1) as usize).flat_map(|(_, logs)| logs.clone()).collect();
        if !chain.calm && chain.dice.one_in(30) {
            return Err(SourceError::Failed("the answer was cut off".into()));
        }
        if !chain.calm && chain.dice.one_in(30) && !logs.is_empty() {
            let which = chain.dice.below(logs.len() as u64) as usize;
            match chain.dice.below(4) {
                0 => logs[which].removed = true,
                1 => logs[which].block_number = to + 1,
                2 => logs.push(logs[which].clone()),
                _ => logs[which].block_hash = [0xff; 32],
            }
        }
        let turn = chain.dice.next() as usize % logs.len().max(1);
        logs.rotate_left(turn);
        Ok(logs)
    }
}

/// Who follows the market: applies what happens and undoes what is taken back, as it says on [`Notice`].
#[derive(Clone, Default)]
struct Follower {
    events: Vec<(u64, Hash, u64)>,
    up_to: Option<Point>,
}

impl Follower {
    fn take(&mut self, notice: &Notice) -> Result<(), String> {
        match notice {
            Notice::Log { cursor, block, log } => {
                if (block.point(), Some(log.index), block.hash) != (cursor.at(), cursor.index(), log.block_hash) {
                    return Err(format!("the cursor of {log:?} is {cursor}"));
                }
                if self.events.last().is_some_and(|last| (last.0, last.2) >= (log.block_number, log.index)) {
                    return Err(format!("{:?} and then {log:?}", self.events.last()));
                }
                self.events.push(key(log));
            }
            Notice::UpTo { block, .. } => self.up_to = Some(block.point()),
            Notice::Back { cursor } => {
                let kept = cursor.as_ref().map_or(0, |cursor| {
                    let at = cursor.at().number;
                    self.events.partition_point(|event| event.0 <= at)
                });
                self.events.truncate(kept);
            }
        }
        Ok(())
    }
}

/// What a run has seen, to prove that the schedules reach what they are for.
#[derive(Debug, Default)]
struct Seen {
    backs: u64,
    to_nothing: u64,
    errors: u64,
    restarts: u64,
    events: u64,
    calls: u64,
}

/// Runs one schedule; `through` stands between the reader and the endpoint.
fn schedule<S: Source>(seed: u64, through: impl Fn(Endpoint) -> S, inner: impl Fn(&S) -> &Endpoint) -> Result<Seen, String> {
    let mut dice = Dice(seed);
    let weather = Weather {
        reorg: 6 + dice.below(60),
        deepest: 64,
        growth: 5 + dice.below(60),
        fault: 8 + dice.below(100),
        widest: [1, 3, 5, 50, 10_000][dice.below(5) as usize],
        sparse: [2, 3, 8, 20][dice.below(4) as usize],
    };
    let first = dice.below(8);
    let mut chain = Chain { dice: Dice(dice.next()), weather, blocks: Vec::new(), made: 0, calm: false, calls: 0 };
    for _ in 0..=dice.below(100) {
        chain.grow();
    }
    let source = through(Endpoint(Mutex::new(chain)));
    let mut follower = Follower::default();
    let mut reader = Reader::new(first, None);
    // What the follower has on disk after each notice, and so what a restart may find.
    let mut kept: Vec<(Option<String>, Follower)> = vec![(None, Follower::default())];
    let mut seen = Seen::default();
    for _ in 0..120 {
        let before = reader.cursor().cloned();
        match block_on(reader.round(&source)) {
            Ok(round) => {
                for notice in &round.notices {
                    follower.take(notice)?;
                    seen.backs += u64::from(matches!(notice, Notice::Back { .. }));
                    seen.to_nothing += u64::from(matches!(notice, Notice::Back { cursor: None }));
                    if dice.one_in(4) {
                        let cursor = match notice {
                            Notice::Log { cursor, .. } | Notice::UpTo { cursor, .. } => Some(cursor.to_string()),
                            Notice::Back { cursor } => cursor.as_ref().map(Cursor::to_string),
                        };
                        let place = dice.below(24) as usize;
                        if kept.len() < 24 {
                            kept.push((cursor, follower.clone()))
                        } else {
                            kept[place] = (cursor, follower.clone())
                        }
                    }
                }
            }
            Err(_) if reader.cursor() != before.as_ref() => return Err("an error moved the cursor".into()),
            Err(_) => seen.errors += 1,
        }
        if dice.one_in(12) {
            let (cursor, state) = &kept[dice.below(kept.len() as u64) as usize];
            let cursor = cursor.as_ref().map(|text| text.parse().map_err(|error| format!("{text}: {error}"))).transpose()?;
            (reader, follower) = (Reader::new(first, cursor), state.clone());
            seen.restarts += 1;
        }
    }
    {
        // Whoever waits for the longer fork must see it.
        let mut chain = inner(&source).0.lock();
        chain.calm = true;
        while chain.head().number <= reader.cursor().map_or(first, |cursor| cursor.at().number) {
            chain.grow();
        }
    }
    let mut rounds = 0;
    while block_on(reader.round(&source))
        .map_err(|error| format!("on a calm chain: {error}"))
        .and_then(|round| round.notices.iter().try_for_each(|notice| follower.take(notice)).map(|()| round.more))?
    {
        rounds += 1;
        if rounds > 5_000 {
            return Err("it never arrives".into());
        }
    }
    let chain = inner(&source).0.lock();
    if follower.up_to != Some(chain.head()) {
        return Err(format!("read up to {:?}, the head is {:?}", follower.up_to, chain.head()));
    }
    if follower.events != chain.events(first) {
        return Err(format!("{} events, the chain has {}", follower.events.len(), chain.events(first).len()));
    }
    seen.events = follower.events.len() as u64;
    seen.calls = chain.calls;
    Ok(seen)
}

#[test]
fn whoever_follows_ends_with_the_events_of_the_chain_whatever_happens_on_the_way() {
    let mut all = Seen::default();
    for seed in 0..4_000 {
        let seen = schedule(seed, |endpoint| endpoint, |endpoint| endpoint).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        all.backs += seen.backs;
        all.to_nothing += seen.to_nothing;
        all.errors += seen.errors;
        all.restarts += seen.restarts;
        all.events += seen.events;
        all.calls += seen.calls;
    }
    println!("{all:?}");
    assert!(all.backs > 4_000 && all.to_nothing > 0 && all.errors > 4_000 && all.restarts > 4_000, "{all:?}");
}

/// How many of 200 schedules fail with this between the reader and the endpoint.
fn failures<S: Source>(through: impl Fn(Endpoint) -> S, inner: impl Fn(&S) -> &Endpoint) -> usize {
    (0..200).filter(|&seed| schedule(seed, &through, &inner).is_err()).count()
}

/// What a reader would see that went on after an error: no logs.
struct ErrorsAreNothing(Endpoint);

#[async_trait]
impl Source for ErrorsAreNothing {
    async fn head(&self) -> Result<Point, SourceError> {
        self.0.head().await
    }

    async fn block(&self, number: u64) -> Result<Option<Header>, SourceError> {
        self.0.block(number).await
    }

    async fn logs(&self, from: u64, to: u64) -> Result<Vec<Log>, SourceError> {
        Ok(self.0.logs(from, to).await.unwrap_or_default())
    }
}

#[test]
fn a_cursor_that_moves_over_an_error_does_not_pass() {
    let failed = failures(ErrorsAreNothing, |source| &source.0);
    assert!(failed > 100, "{failed} of 200");
}

/// Another fork takes over each time that logs are asked for, and nothing has happened on it.
struct ForksAtLogs(Endpoint);

#[async_trait]
impl Source for ForksAtLogs {
    async fn head(&self) -> Result<Point, SourceError> {
        self.0.head().await
    }

    async fn block(&self, number: u64) -> Result<Option<Header>, SourceError> {
        self.0.block(number).await
    }

    async fn logs(&self, from: u64, to: u64) -> Result<Vec<Log>, SourceError> {
        {
            let mut chain = self.0.0.lock();
            chain.blocks.truncate(10);
            chain.weather.sparse = u64::MAX;
            (0..20).for_each(|_| chain.grow());
        }
        self.0.logs(from, to).await
    }
}

#[test]
fn logs_of_a_fork_that_took_over_meanwhile_are_thrown_away() {
    let source = ForksAtLogs(calm(30, 50));
    for read in [5, 15] {
        let mut reader = Reader::new(0, None);
        let before = calm(read, 50);
        read_all(&mut reader, &before);
        let told = reader.cursor().cloned();
        let error = loop {
            // The first round may find that the chain has left the cursor, which is no matter here.
            match block_on(reader.round(&source)) {
                Ok(round) if matches!(round.notices[..], [Notice::Back { .. }]) => continue,
                other => break other.unwrap_err(),
            }
        };
        assert!(matches!(error, RoundError::Moved(_)), "{error}");
        assert!(reader.cursor().map(|cursor| cursor.at().number) <= told.map(|cursor| cursor.at().number));
    }
}

/// A chain to which nothing happens.
fn calm(blocks: u64, widest: u64) -> Endpoint {
    let weather = Weather { reorg: 1, deepest: 1, growth: 1, fault: 1, widest, sparse: 2 };
    let mut chain = Chain { dice: Dice(1), weather, blocks: Vec::new(), made: 0, calm: true, calls: 0 };
    for _ in 0..blocks {
        chain.grow();
    }
    Endpoint(Mutex::new(chain))
}

fn read_all(reader: &mut Reader, source: &Endpoint) -> (u64, Follower) {
    let (mut rounds, mut follower) = (0, Follower::default());
    loop {
        let round = block_on(reader.round(source)).unwrap();
        round.notices.iter().for_each(|notice| follower.take(notice).unwrap());
        rounds += 1;
        if !round.more {
            return (rounds, follower);
        }
    }
}

#[test]
fn the_range_grows_while_it_is_answered_and_stays_under_what_is_refused() {
    let (mut reader, source) = (Reader::new(0, None), calm(50_000, u64::MAX));
    let (rounds, follower) = read_all(&mut reader, &source);
    assert_eq!(follower.events, source.0.lock().events(0));
    assert!(rounds < 40, "{rounds} rounds for 50,000 blocks");

    let (mut reader, source) = (Reader::new(0, None), calm(1_000, 5));
    let (rounds, follower) = read_all(&mut reader, &source);
    assert_eq!(follower.events, source.0.lock().events(0));
    assert!(rounds < 300, "{rounds} rounds for 1,000 blocks, five at a time");
    let calls = source.0.lock().calls;
    assert!(calls < 1_900, "{calls} calls for {rounds} rounds: what is refused is tried too often");
}

#[test]
fn an_endpoint_that_lags_takes_nothing_back() {
    let mut reader = Reader::new(0, None);
    read_all(&mut reader, &calm(100, 50));
    let told = reader.cursor().cloned();
    // The same dice make the same chain, which ends earlier.
    for blocks in [99, 90, 50, 2] {
        let error = block_on(reader.round(&calm(blocks, 50))).unwrap_err();
        assert_eq!(error, RoundError::Behind { head: blocks - 1, cursor: 99 });
        assert_eq!(reader.cursor(), told.as_ref());
    }
    assert!(!block_on(reader.round(&calm(100, 50))).unwrap().more);
}

#[test]
fn a_deep_reorganisation_is_undone_from_the_cursor_alone_and_not_far_beyond_its_depth() {
    let mut reader = Reader::new(0, None);
    let source = calm(1, 10_000);
    for _ in 0..3_000 {
        source.0.lock().grow();
        read_all(&mut reader, &source);
    }
    let text = reader.cursor().unwrap().to_string();
    for depth in [1, 2, 7, 40, 200, 900] {
        let mut reader = Reader::new(0, Some(text.parse().unwrap()));
        let other = calm(3_001 - depth, 10_000);
        other.0.lock().made = 1_000_000 * depth;
        (0..=depth).for_each(|_| other.0.lock().grow());
        let round = block_on(reader.round(&other)).unwrap();
        let [Notice::Back { cursor: Some(cursor) }] = &round.notices[..] else { panic!("{round:?}") };
        let undone = 3_000 - cursor.at().number;
        assert!((depth..=4 * depth + 8).contains(&undone), "{undone} blocks undone for {depth}");
    }
}

#[test]
fn logs_that_the_range_cannot_have_are_refused() {
    let logs = calm(30, 50).0.lock().blocks[5..20].iter().flat_map(|(_, logs)| logs.clone()).collect::<Vec<_>>();
    assert_eq!(in_order(logs.iter().rev().cloned().collect(), 5, 19), Ok(logs.clone()));
    let refused = |logs: Vec<Log>, from, to| matches!(in_order(logs, from, to), Err(RoundError::Malformed(_)));
    let (first, last) = (logs[0].block_number, logs[logs.len() - 1].block_number);
    assert!(refused(logs.clone(), first + 1, last) && refused(logs.clone(), first, last - 1));
    let mut removed = logs.clone();
    removed[2].removed = true;
    assert!(refused(removed, 5, 19));
    let twice = logs.iter().chain([&logs[3]]).cloned().collect();
    assert!(refused(twice, 5, 19));
}

#[test]
fn before_the_first_block_there_is_nothing_to_tell() {
    let mut reader = Reader::new(200, None);
    assert_eq!(block_on(reader.round(&calm(100, 50))), Ok(Round { notices: Vec::new(), more: false }));
    assert_eq!(reader.cursor(), None);
}

//! Whether two questions differ in a word that changes the answer.
//!
//! Vectors hardly see such a word: "convert 15 miles to kilometers" and "convert 50 kilometers to miles" lie closer together than most
//! paraphrases. So before two vectors are compared, the words are. A question is taken apart into what an answer hangs on, and two questions
//! that differ in any part are two questions. What is left of the words after filler, endings and a few synonyms are gone has to be the same on
//! both sides; how it is put together is for the vectors to judge.
//!
//! The words are English. A question in another language keeps all of its words, so that it has only itself for an equal but for order.

use std::collections::BTreeSet;

/// What two questions differ in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Veto {
    Number,
    Negation,
    Code,
    /// Who, when, where, why, how many, or whether.
    Question,
    /// Before it happened, or after.
    Tense,
    /// What may, must or can be.
    Modal,
    /// Who is compared with whom, what is turned into what.
    Direction,
    Word,
}

impl Veto {
    pub const ALL: [Veto; 8] =
        [Veto::Number, Veto::Negation, Veto::Code, Veto::Question, Veto::Tense, Veto::Modal, Veto::Direction, Veto::Word];

    pub fn word(self) -> &'static str {
        match self {
            Veto::Number => "number",
            Veto::Negation => "negation",
            Veto::Code => "code",
            Veto::Question => "question",
            Veto::Tense => "tense",
            Veto::Modal => "modal",
            Veto::Direction => "direction",
            Veto::Word => "word",
        }
    }
}

/// A question, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// In their order, digits and words alike.
    numbers: Vec<String>,
    negated: bool,
    /// Words that only a program would write, as they are written; signs between numbers, and pictures.
    code: BTreeSet<String>,
    asks: Asks,
    tense: Tense,
    /// Of a question that is answered with yes or no.
    modal: Option<&'static str>,
    /// Words behind those that give a direction: "than dogs", "from Paris", "before eating".
    directions: BTreeSet<(String, String)>,
    /// What each number counts: the word behind it, and behind the time of a day the place.
    counts: BTreeSet<(String, String)>,
    /// Everything else that has a meaning of its own, without endings.
    words: BTreeSet<String>,
    /// The same in their order.
    order: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asks {
    Who,
    When,
    Where,
    Why,
    HowMany,
    Whether,
    /// What, which, how, and what is no question.
    Open,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tense {
    Past,
    Present,
    Future,
}

impl Question {
    pub fn new(text: &str) -> Question {
        let text = text.replace(['’', '`'], "'");
        let tokens: Vec<Token> = text.split_whitespace().flat_map(tokens).collect();
        let lower: Vec<&str> = tokens.iter().map(|token| token.lower.as_str()).collect();
        let has = |words: &[&str]| lower.iter().any(|word| words.contains(word));
        let past = has(PAST);
        let passive = !past && has(&["is", "are", "be", "been", "being", "get", "gets"]);
        let asks = asks(&lower);
        let mut question = Question {
            numbers: Vec::new(),
            negated: has(NEGATIONS) || lower.iter().any(|word| word.ends_with("n't")),
            code: BTreeSet::new(),
            asks,
            tense: match () {
                () if past => Tense::Past,
                () if has(FUTURE) || lower.windows(2).any(|pair| pair == ["going", "to"]) => Tense::Future,
                () => Tense::Present,
            },
            modal: (asks == Asks::Whether).then(|| modal(&lower)).flatten(),
            directions: BTreeSet::new(),
            counts: BTreeSet::new(),
            words: BTreeSet::new(),
            order: Vec::new(),
        };
        let shouted = !text.chars().any(char::is_lowercase);
        let mut direction: Option<&str> = None;
        let mut counted: Option<String> = None;
        for (at, token) in tokens.iter().enumerate() {
            let word = token.lower.as_str();
            let is_filler = match word {
                // "Is a visa needed?" is about a must, "what is needed for it?" about things.
                "needed" => asks == Asks::Whether,
                "best" => lower.get(at + 1) == Some(&"way"),
                // "IT", "WHO" and "US" are names.
                word if !shouted && word.len() > 1 && word != "ok" && token.written == word.to_ascii_uppercase() => false,
                // And the month is one.
                "may" => at == 0 || around(&lower, at).any(|word| PRONOUNS.contains(&word)),
                word if at < ASKING_WITHIN && ASKING.contains(&word) => true,
                word => FILLER.contains(&word) || NEGATIONS.contains(&word) || word.ends_with("n't"),
            };
            if let Some(number) = number(word) {
                // "A", "one" and "the" are often the same word.
                if number != "1" || word == "1" {
                    counted = Some(number.clone());
                    question.numbers.push(number);
                }
                direction = None;
            } else if token.code {
                question.code.insert(token.written.clone());
            } else if let Some(marker) = DIRECTIONS.iter().find(|marker| **marker == word) {
                direction = Some(marker);
                if TURNING.contains(&word) {
                    question.words.insert(word.to_owned());
                }
            } else if !is_filler {
                let stem = stem(word, passive);
                if let Some(marker) = direction.take() {
                    question.directions.insert((marker.to_owned(), stem.clone()));
                }
                if let Some(number) = counted.take_if(|_| !["am", "pm"].contains(&word)) {
                    question.counts.insert((number, stem.clone()));
                }
                question.words.insert(stem.clone());
                question.order.push(stem);
            }
        }
        question
    }

    /// What keeps the answer to one question from being the answer to the other; `None` where nothing is known to.
    pub fn differs(&self, other: &Question) -> Option<Veto> {
        let markers = |question: &Question| question.directions.iter().map(|(marker, _)| marker.clone()).collect::<BTreeSet<_>>();
        let turned = markers(self) == markers(other) && self.directions != other.directions;
        let counts_other = |(number, word): &(String, String)| {
            let mut same = other.counts.iter().filter(|(counted, _)| counted == number).peekable();
            same.peek().is_some() && same.all(|(_, counted)| counted != word)
        };
        let found = [
            (self.numbers != other.numbers, Veto::Number),
            (self.negated != other.negated, Veto::Negation),
            (self.code != other.code, Veto::Code),
            (self.asks != other.asks, Veto::Question),
            (self.tense != other.tense, Veto::Tense),
            (self.modal != other.modal, Veto::Modal),
            (self.words != other.words || self.words.is_empty(), Veto::Word),
            (turned || self.counts.iter().any(counts_other) || self.is_reverse_of(other), Veto::Direction),
        ];
        found.into_iter().find_map(|(differs, veto)| differs.then_some(veto))
    }

    /// Whether two words have changed places around a third: "did Germany beat Brazil" and "did Brazil beat Germany".
    fn is_reverse_of(&self, other: &Question) -> bool {
        let place = |word: &String| other.order.iter().position(|known| known == word);
        let places: Option<Vec<usize>> = self.order.iter().map(place).collect();
        let Some(places) = places else { return false };
        // The greatest before each word, and the least behind it: whether one of those is behind it over there, and one of these before it.
        (1..places.len().saturating_sub(1)).any(|middle| {
            let before = places[..middle].iter().any(|place| *place > places[middle]);
            before && places[middle + 1..].iter().any(|place| *place < places[middle])
        })
    }
}

/// The words beside one.
fn around<'a>(words: &'a [&'a str], at: usize) -> impl Iterator<Item = &'a str> {
    let before = at.checked_sub(1).and_then(|before| words.get(before));
    before.into_iter().chain(words.get(at + 1)).copied()
}

struct Token {
    /// As it is written, without punctuation around it.
    written: String,
    lower: String,
    /// Whether only a program would have it.
    code: bool,
}

/// A word between spaces, in its parts: "tomato/fruit" are two, "mother-in-law's" three, "std::fs" is one.
fn tokens(word: &str) -> Vec<Token> {
    let bare = word.trim_matches(|mark: char| !mark.is_alphanumeric() && !"%#+_$".contains(mark)).trim_end_matches("'s");
    let camel = bare.chars().zip(bare.chars().skip(1)).any(|(one, next)| one.is_lowercase() && next.is_uppercase());
    let marks = bare.contains("::") || bare.contains(['_', '(', '{', '=', '<', '\\', '@', '$']) || word.contains("()");
    let is_code = marks || camel && bare.chars().next().is_some_and(char::is_lowercase) || bare.ends_with(['+', '#']);
    let token = |part: &str, code: bool| Token { written: part.to_owned(), lower: part.to_lowercase(), code };
    let signs: String = word.chars().filter(|mark| is_sign(*mark, word)).collect();
    if !signs.is_empty() && !is_code {
        let mut parts = vec![token(&signs, true)];
        parts.extend(tokens(&word.replace(|mark: char| is_sign(mark, word), " ")));
        return parts;
    }
    if is_code {
        return vec![token(bare, true)];
    }
    let mut parts = Vec::new();
    for part in bare.split(|mark: char| !mark.is_alphanumeric() && !"'.,%".contains(mark)) {
        // "15km" and "20%" are a number and its unit.
        let digits = part.find(|mark: char| !mark.is_ascii_digit() && mark != '.' && mark != ',').filter(|at| *at > 0);
        match digits.filter(|_| part.starts_with(|mark: char| mark.is_ascii_digit())) {
            Some(at) => parts.extend([token(&part[..at], false), token(&part[at..], false)]),
            None if part.is_empty() => {}
            None => parts.push(token(part, false)),
        }
    }
    parts
}

/// Whether a mark says something by itself: what is calculated, whether a number is below zero, or a picture.
fn is_sign(mark: char, word: &str) -> bool {
    match mark {
        '*' | '/' | '^' | '<' | '>' | '=' | '|' | '&' | '~' | '+' | '-' => {
            word.contains(|mark: char| mark.is_ascii_digit()) || !word.contains(char::is_alphanumeric)
        }
        mark => !mark.is_ascii() && !mark.is_alphanumeric() && !"’‘“”–—…¿¡«»·".contains(mark),
    }
}

/// The number that a word is.
fn number(word: &str) -> Option<String> {
    if word.starts_with(|first: char| first.is_ascii_digit())
        && word.chars().all(|digit| digit.is_ascii_digit() || ".,".contains(digit))
    {
        return Some(word.replace(',', ""));
    }
    let named = NUMBERS.iter().find(|(name, _)| *name == word);
    named.map(|(_, number)| (*number).to_owned())
}

fn asks(words: &[&str]) -> Asks {
    let has = |wanted: &[&str]| words.iter().any(|word| wanted.contains(word));
    let pair = |first: &str, second: &[&str]| words.windows(2).any(|pair| pair[0] == first && second.contains(&pair[1]));
    let opens = words.iter().position(|word| !POLITE.contains(word)).map_or("", |at| words[at]);
    let wondering = [
        "is", "are", "was", "were", "do", "does", "did", "has", "have", "had", "can", "could", "should", "must", "may", "will",
        "would", "am",
    ];
    match () {
        () if has(&["who", "whom", "whose", "author", "winner", "inventor"]) => Asks::Who,
        () if has(&["why", "reason", "because"]) || pair("what", &["makes", "causes"]) => Asks::Why,
        () if pair("how", &["many", "much", "long", "far", "old", "tall", "large", "big", "often"])
            || has(&["number", "distance"]) =>
        {
            Asks::HowMany
        }
        () if has(&["what", "which", "at"]) && has(&["year", "date", "time", "day"]) => Asks::When,
        () if words.first() == Some(&"when") && !has(&["what"]) => Asks::When,
        () if has(&["where"]) => Asks::Where,
        () if has(&["what", "which", "how", "explain", "describe"]) => Asks::Open,
        () if has(&["whether"]) || wondering.contains(&opens) && words.get(1) != Some(&"you") => Asks::Whether,
        () if words
            .windows(2)
            .any(|pair| wondering.contains(&pair[0]) && ["i", "one", "he", "she", "they", "we"].contains(&pair[1])) =>
        {
            Asks::Whether
        }
        () => Asks::Open,
    }
}

fn modal(words: &[&str]) -> Option<&'static str> {
    words.iter().find_map(|word| match *word {
        "can" | "could" | "able" | "possible" | "may" | "okay" | "ok" | "allowed" => Some("can"),
        "must" | "need" | "needs" | "needed" | "necessary" | "required" => Some("must"),
        "should" | "recommended" => Some("should"),
        _ => None,
    })
}

/// A word without its ending, or the word that stands for it. With `passive`, "is reversed" is "reverse".
fn stem(word: &str, passive: bool) -> String {
    let mut stem = word.trim_end_matches("'s").trim_end_matches('\'').to_owned();
    let mut cut = |ending: &str, least: usize, put: &str| {
        let fits = stem.len() >= least + ending.len() && stem.ends_with(ending);
        if fits {
            stem.truncate(stem.len() - ending.len());
            stem.push_str(put);
        }
        fits
    };
    let _ = cut("ies", 3, "y")
        || cut("sses", 2, "ss")
        || cut("xes", 2, "x")
        || cut("ches", 2, "ch")
        || cut("shes", 2, "sh")
        || cut("oes", 3, "o")
        || (!word.ends_with("ss") && !word.ends_with("us") && !word.ends_with("is") && cut("s", 3, ""));
    let _ = cut("ing", 4, "") || passive && cut("ed", 3, "");
    let mut stem = stem;
    // "running", "stopped"; and the e of "use" that "using" lacks.
    let bytes = stem.as_bytes();
    if stem.len() < word.len()
        && bytes.len() > 3
        && bytes[bytes.len() - 1] == bytes[bytes.len() - 2]
        && !stem.ends_with(['s', 'l', 'e'])
    {
        stem.pop();
    }
    let stem = if stem.len() > 3 { stem.strip_suffix('e').unwrap_or(&stem).to_owned() } else { stem };
    let same = SYNONYMS.iter().find(|group| group.contains(&stem.as_str()));
    same.map_or(stem, |group| group[0].to_owned())
}

const NEGATIONS: &[&str] =
    &["not", "no", "never", "without", "cannot", "none", "nothing", "neither", "nor", "except", "excluding", "avoid", "unless"];
const PAST: &[&str] = &["did", "was", "were", "had", "ago", "yesterday", "used"];
const FUTURE: &[&str] = &["will", "shall", "gonna", "tomorrow"];
const DIRECTIONS: &[&str] =
    &["than", "from", "into", "before", "after", "under", "over", "until", "since", "to", "with", "of", "by", "in"];

/// Those of them that a paraphrase keeps.
const TURNING: &[&str] = &["before", "after", "under", "over", "until", "since"];

/// Words around a request that it can do without.
const POLITE: &[&str] = &["please", "hello", "hi", "hey", "so", "and", "then", "now"];

/// Words that say nothing of their own: articles, helpers, and ways of asking. What they say together is kept apart: question, tense, modal.
const FILLER: &[&str] = &[
    "a",
    "an",
    "the",
    "this",
    "that",
    "these",
    "those",
    "it",
    "its",
    "there",
    "is",
    "are",
    "was",
    "were",
    "be",
    "been",
    "being",
    "am",
    "do",
    "does",
    "did",
    "has",
    "have",
    "had",
    "can",
    "could",
    "should",
    "would",
    "will",
    "shall",
    "must",
    "might",
    "able",
    "possible",
    "okay",
    "ok",
    "need",
    "needs",
    "needed",
    "i",
    "me",
    "my",
    "you",
    "one",
    "we",
    "us",
    "our",
    "person",
    "people",
    "their",
    "they",
    "what",
    "which",
    "who",
    "whom",
    "whose",
    "when",
    "where",
    "why",
    "how",
    "whether",
    "if",
    "what's",
    "who's",
    "how's",
    "it's",
    "i'm",
    "please",
    "way",
    "ways",
    "steps",
    "reason",
    "number",
    "mean",
    "means",
    "meaning",
    "definition",
    "much",
    "many",
    "at",
    "on",
    "for",
    "as",
    "so",
    "just",
    "also",
    "and",
    "year",
    "date",
    "called",
    "get",
    "gets",
    "command",
    "author",
    "each",
    "per",
    "using",
];

const PRONOUNS: &[&str] = &["i", "we", "you", "he", "she", "it", "they", "one", "be", "not"];

/// Words that ask for something, as one of the first.
const ASKING: &[&str] = &[
    "tell",
    "show",
    "give",
    "explain",
    "describe",
    "say",
    "know",
    "want",
    "help",
    "let",
    "list",
    "name",
    "define",
    "calculate",
    "like",
];
const ASKING_WITHIN: usize = 4;

/// Words that mean the same, nearly everywhere, by their stems.
const SYNONYMS: &[&[&str]] = &[
    &["big", "large", "bigger", "larger"],
    &["begin", "start"],
    &["buy", "purchas"],
    &["repair", "fix"],
    &["delet", "remov"],
    &["color", "colour"],
    &["km", "kilometer", "kilometr"],
    &["mile", "mi"],
    &["kg", "kilogram"],
    &["gram", "g"],
    &["meter", "metr", "m"],
    &["%", "percent"],
    &["usa", "us", "america"],
    &["child", "children", "kid"],
    &["car", "automobil"],
    &["quick", "fast", "quickly"],
    &["differenc", "differ", "distinguish"],
    &["smart", "smarter", "intelligent"],
    &["writ", "wrote", "written", "compos"],
    &["winner", "won"],
    &["bacteria", "bacterium"],
    &["summariz", "summaris", "summary"],
    &["liv", "population"],
    &["tire", "tyr", "tir"],
    &["autumn", "fall"],
];

const NUMBERS: &[(&str, &str)] = &[
    ("zero", "0"),
    ("one", "1"),
    ("once", "1"),
    ("two", "2"),
    ("twice", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
    ("eleven", "11"),
    ("twelve", "12"),
    ("dozen", "12"),
    ("fifteen", "15"),
    ("twenty", "20"),
    ("thirty", "30"),
    ("fifty", "50"),
    ("hundred", "100"),
    ("thousand", "1000"),
    ("million", "1000000"),
    ("billion", "1000000000"),
    ("half", "0.5"),
    ("first", "1st"),
    ("second", "2nd"),
    ("third", "3rd"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn differs(one: &str, other: &str) -> Option<Veto> {
        Question::new(one).differs(&Question::new(other))
    }

    #[test]
    fn what_vectors_do_not_see_is_seen() {
        let pairs = [
            ("Did Germany beat Brazil?", "Did Brazil beat Germany?", Veto::Direction),
            ("Does smoking cause cancer?", "Does cancer cause smoking?", Veto::Direction),
            ("What is the result of 8 * 2?", "What is the result of 8 / 2?", Veto::Code),
            ("What is the result of 8 - 2?", "What is the result of 8 2?", Veto::Code),
            ("What is 8*2?", "What is 8^2?", Veto::Code),
            ("What is the square root of -4?", "What is the square root of 4?", Veto::Code),
            ("What is the meaning of the emoji 😀?", "What is the meaning of the emoji 😡?", Veto::Code),
            ("What is the average temperature in Paris in May?", "What is the average temperature in Paris?", Veto::Word),
            ("How many states are in the US?", "How many states are in it?", Veto::Word),
        ];
        for (one, other, veto) in pairs {
            assert_eq!(differs(one, other), Some(veto), "{one} | {other}");
            assert_eq!(differs(other, one), Some(veto), "{other} | {one}");
        }
    }

    #[test]
    fn the_same_in_other_words_is_the_same() {
        let pairs = [
            ("What is the capital of Peru?", "Tell me Peru's capital."),
            ("May I eat raw eggs?", "Can one eat raw eggs?"),
            ("Is it OK to eat raw eggs?", "is it okay to eat raw eggs"),
            ("What is the result of 8 * 2?", "What's the result of 8 * 2?"),
            ("WHAT IS THE CAPITAL OF PERU?", "What is the capital of Peru?"),
        ];
        for (one, other) in pairs {
            assert_eq!(differs(one, other), None, "{one} | {other}");
        }
    }
}

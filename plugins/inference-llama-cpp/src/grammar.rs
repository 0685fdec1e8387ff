//! Constraints on an answer's form, as llama.cpp grammars.

use std::thread;

use fabstir_plugin_api::inference::Format;
use llama_cpp_2::json_schema_to_grammar;
use llama_cpp_2::sampling::LlamaSampler;

use crate::engine::model::Model;
use crate::error::Error;

/// A JSON object, as `json_object` promises. Space between tokens is bounded, or a model may write nothing else for ever.
const JSON: &str = r#"root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"#;

/// Schemas and grammars longer than this are refused: what llama.cpp makes of them grows faster than they do.
const LONGEST: usize = 64 << 10;

/// llama.cpp's parser calls itself for each level of brackets.
const DEEPEST: usize = 64;

/// It also follows chains of rules by recursion, so it gets a stack that no text of `LONGEST` can exhaust.
const STACK: usize = 64 << 20;

/// The sampler that keeps an answer to its format; `None` where any text will do.
pub fn sampler(model: &Model, format: &Format) -> Result<Option<LlamaSampler>, Error> {
    if *format == Format::Text {
        return Ok(None);
    }
    let build = || {
        let grammar = source(format)?;
        LlamaSampler::grammar(model.inner(), &grammar, "root").map(Some).map_err(|_| {
            Error::Invalid("the grammar cannot be used: it must parse, begin at `root` and not recurse on the left".into())
        })
    };
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("grammar".into()).stack_size(STACK).spawn_scoped(scope, build);
        let worker = worker.map_err(|error| Error::Failed(format!("no thread for the grammar: {error}")))?;
        worker.join().unwrap_or_else(|_| Err(Error::Failed("the grammar could not be built".into())))
    })
}

/// The grammar's text.
fn source(format: &Format) -> Result<String, Error> {
    match format {
        Format::Text | Format::Json => Ok(JSON.to_owned()),
        Format::JsonSchema(schema) => from_schema(schema),
        Format::Gbnf(grammar) => {
            check_length("grammar", grammar)?;
            if nesting(grammar) > DEEPEST {
                return Err(Error::Invalid(format!("the grammar nests brackets deeper than {DEEPEST}")));
            }
            if grammar.contains('\0') {
                return Err(Error::Invalid("the grammar contains a zero byte".into()));
            }
            Ok(grammar.clone())
        }
    }
}

fn from_schema(schema: &str) -> Result<String, Error> {
    check_length("JSON schema", schema)?;
    // serde_json refuses nesting beyond 128 levels, which llama.cpp's recursive reader would follow into the ground.
    let parsed: serde_json::Value =
        serde_json::from_str(schema).map_err(|error| Error::Invalid(format!("the JSON schema is not JSON: {error}")))?;
    if !parsed.is_object() {
        return Err(Error::Invalid("the JSON schema must be a JSON object".into()));
    }
    let grammar = json_schema_to_grammar(&parsed.to_string())
        .map_err(|_| Error::Invalid("the JSON schema uses something that cannot be turned into a grammar".into()))?;
    Ok(grammar)
}

fn check_length(what: &str, text: &str) -> Result<(), Error> {
    if text.len() > LONGEST {
        return Err(Error::Invalid(format!("the {what} has {} bytes, at most {LONGEST} are accepted", text.len())));
    }
    Ok(())
}

/// The deepest nesting of round brackets outside of literals, character classes and comments.
fn nesting(grammar: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    let mut inside = None;
    let mut characters = grammar.chars();
    while let Some(character) = characters.next() {
        match (inside, character) {
            (Some('"' | ']'), '\\') => _ = characters.next(),
            (Some(end), _) if character == end => inside = None,
            (Some(_), _) => {}
            (None, '"') => inside = Some('"'),
            (None, '[') => inside = Some(']'),
            (None, '#') => inside = Some('\n'),
            (None, '(') => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            (None, ')') => depth = depth.saturating_sub(1),
            (None, _) => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_becomes_a_grammar() {
        let schema = r#"{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}"#;
        assert!(source(&Format::JsonSchema(schema.into())).unwrap().contains("root ::="));
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        for schema in ["", "{", "[]", "\"x\"", r#"{"$ref": "https://example.com/x.json"}"#, r#"{"type": "sandwich"}"#] {
            let error = source(&Format::JsonSchema(schema.into())).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{schema}: {error}");
        }
        let deep = format!("{}1{}", r#"{"a":"#.repeat(200), "}".repeat(200));
        assert!(source(&Format::JsonSchema(deep)).is_err());
        assert!(source(&Format::JsonSchema(format!("{{\"title\": \"{}\"}}", "x".repeat(LONGEST)))).is_err());
    }

    #[test]
    fn brackets_are_counted_where_they_count() {
        assert_eq!(nesting(r#"root ::= (("a" | [(] | "\"((")) # ((("#), 2);
        let deep = format!("root ::= {}\"a\"{}", "(".repeat(1000), ")".repeat(1000));
        assert!(source(&Format::Gbnf(deep)).is_err());
    }
}

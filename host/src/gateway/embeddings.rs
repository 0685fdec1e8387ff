//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use fabstir_plugin_api::inference::Embed;
use serde::Serialize;

use super::Edge;
use super::error::ApiError;
use super::fields::Fields;
use super::limits;
use super::prompt::Prompts;
use super::reply::json;

const KEYS: &[&str] = &["model", "input", "encoding_format", "dimensions", "user"];

/// OpenAI's bound.
const MOST_INPUTS: usize = 2048;

pub(super) async fn handle(State(edge): State<Arc<Edge>>, request: Request) -> Result<Response, ApiError> {
    let (caller, body) = limits::json_body(&edge, request).await?;
    let (embed, encoding) = parse(&body)?;
    drop(body);
    let model = embed.model.clone();
    let embeddings = edge.scheduler.embed(caller.cx(&edge), embed).await?;
    let data = embeddings.vectors.iter().zip(0..).map(|(vector, index)| Datum {
        object: "embedding",
        index,
        embedding: match encoding {
            Encoding::Float => Vector::Float(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
                Vector::Base64(BASE64_STANDARD.encode(bytes))
            }
        },
    });
    let tokens = embeddings.prompt_tokens;
    let usage = Usage { prompt_tokens: tokens, total_tokens: tokens };
    let body = json(&List { object: "list", data: data.collect(), model: &model, usage });
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Encoding {
    Float,
    Base64,
}

fn parse(body: &[u8]) -> Result<(Embed, Encoding), ApiError> {
    let mut fields = Fields::parse(body, &[KEYS])?;
    fields.only("dimensions", &[], "this node gives vectors as long as the model makes them; leave it out")?;
    fields.take::<String>("user")?;
    let encoding = match fields.take::<String>("encoding_format")?.as_deref() {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(_) => return Err(ApiError::invalid("encoding_format", "`encoding_format` must be float or base64")),
    };
    let model: String = fields.require("model")?;
    let Prompts(inputs) = fields.require("input")?;
    if inputs.is_empty() {
        return Err(ApiError::invalid("input", "`input` is empty"));
    }
    if inputs.len() > MOST_INPUTS {
        return Err(ApiError::invalid(
            "input",
            format!("`input` holds {} texts, and {MOST_INPUTS} may come at once", inputs.len()),
        ));
    }
    Ok((Embed { model, inputs }, encoding))
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Datum<'a>>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Datum<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    Float(&'a [f32]),
    /// Little-endian 32-bit floats: what OpenAI's Python client asks for.
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_and_encodings_are_read() {
        let (embed, encoding) = parse(br#"{"model": "m", "input": ["a", "b"], "encoding_format": "base64"}"#).expect("good");
        assert_eq!((embed.inputs.len(), encoding), (2, Encoding::Base64));
        for (setting, param) in [
            (r#""input": []"#, "input"),
            (r#""input": "a", "dimensions": 3"#, "dimensions"),
            (r#""input": "a", "encoding_format": "hex""#, "encoding_format"),
        ] {
            let error = parse(format!(r#"{{"model": "m", {setting}}}"#).as_bytes()).expect_err(setting);
            assert_eq!(error.body()["error"]["param"], param);
        }
    }
}

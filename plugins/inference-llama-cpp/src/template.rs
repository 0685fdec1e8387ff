//! The model's own chat template: Jinja, as Hugging Face runs it, rendered by minijinja.

use fabstir_plugin_api::inference::Message;
use minijinja::value::{Kwargs, ViaDeserialize};
use minijinja::{Environment, Error as JinjaError, ErrorKind, context};

use crate::error::Error;

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles `tokenizer.chat_template`; `bos` and `eos` are the texts of these tokens, empty where the model has none.
    pub fn new(source: &str, bos: String, eos: String) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| Error::Template(format!("it cannot be compiled: {}", reason(&error))))?;
        Ok(Self { environment, bos, eos })
    }

    /// The prompt for these messages, up to where the assistant's answer begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, Error> {
        let template = self.environment.get_template(NAME).expect("`new` added this template");
        let values = context! { messages, bos_token => &self.bos, eos_token => &self.eos, add_generation_prompt => true };
        template.render(values).map_err(|error| Error::Template(reason(&error)))
    }
}

/// The template's own words where it refuses, minijinja's otherwise. The text of the messages is in neither.
fn reason(error: &JinjaError) -> String {
    let detail = error.detail().unwrap_or("the template is wrong").to_owned();
    match error.line() {
        Some(line) if error.kind() != ErrorKind::InvalidOperation => format!("{detail} (line {line}, {})", error.kind()),
        _ => detail,
    }
}

fn raise_exception(message: String) -> Result<String, JinjaError> {
    Err(JinjaError::new(ErrorKind::InvalidOperation, message))
}

/// Python's `datetime.now().strftime(format)`.
fn strftime_now(format: String) -> Result<String, JinjaError> {
    let refuse = || JinjaError::new(ErrorKind::InvalidOperation, "strftime_now cannot use this format");
    let format = std::ffi::CString::new(format).map_err(|_| refuse())?;
    let mut buffer = [0u8; 256];
    // SAFETY: `tm` is plain data that localtime_r fills, and strftime writes at most the buffer's length.
    let written = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut moment: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut moment).is_null() {
            return Err(refuse());
        }
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &moment)
    };
    Ok(String::from_utf8_lossy(&buffer[..written]).into_owned())
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: templates depend on its spaces.
fn tojson(value: ViaDeserialize<serde_json::Value>, options: Kwargs) -> Result<minijinja::Value, JinjaError> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted, and already what we do.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut text = String::new();
    write_json(&value, indent, 0, &mut text);
    Ok(minijinja::Value::from_safe_string(text))
}

fn write_json(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    use serde_json::Value;
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (place, item) in items.iter().enumerate() {
                if place > 0 {
                    out.push_str(separator);
                }
                line(out, depth + 1);
                write_json(item, indent, depth + 1, out);
            }
            line(out, depth);
            out.push(']');
        }
        Value::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (place, (key, item)) in fields.iter().enumerate() {
                if place > 0 {
                    out.push_str(separator);
                }
                line(out, depth + 1);
                out.push_str(&Value::String(key.clone()).to_string());
                out.push_str(": ");
                write_json(item, indent, depth + 1, out);
            }
            line(out, depth);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
                          '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into(), name: None }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
        ChatTemplate::new(source, "<s>".into(), "</s>".into())?.render(messages)
    }

    #[test]
    fn chatml_is_rendered_as_its_authors_do() {
        let text = render(CHATML, &[message("system", "Be brief."), message("user", "Hi <b>")]).unwrap();
        assert_eq!(text, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn the_template_may_refuse_in_its_own_words() {
        let source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}";
        let error = render(source, &[message("system", "x")]).unwrap_err();
        assert_eq!(error.to_string(), "the model's chat template refuses the messages: System role not supported");
    }

    #[test]
    fn python_methods_slices_and_tokens_work() {
        let source = "{{ bos_token }}{% for m in messages[1:] %}{{ m.content.strip().upper() }}{{ eos_token }}{% endfor %}\
                      {% if messages[0]['content'].startswith('a') %}!{% endif %}{% if tools is defined %}T{% endif %}";
        assert_eq!(render(source, &[message("system", "abc"), message("user", "  x ")]).unwrap(), "<s>X</s>!");
    }

    #[test]
    fn blocks_on_their_own_line_leave_no_trace() {
        let source = "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source, &[message("user", "x"), message("assistant", "y")]).unwrap(), "x\n");
    }

    #[test]
    fn json_looks_as_python_writes_it() {
        let source = "{{ messages | tojson }}";
        assert_eq!(render(source, &[message("user", "a<é\"")]).unwrap(), r#"[{"role": "user", "content": "a<é\""}]"#);
        let source = "{{ {'a': [1, 2.5], 'b': {}} | tojson(indent=2) }}";
        assert_eq!(render(source, &[]).unwrap(), "{\n  \"a\": [\n    1,\n    2.5\n  ],\n  \"b\": {}\n}");
    }

    #[test]
    fn the_date_is_to_be_had() {
        let year = render("{{ strftime_now('%Y') }}", &[]).unwrap();
        assert!(year.parse::<u32>().unwrap() >= 2024, "{year}");
    }

    #[test]
    fn a_broken_template_is_an_error_with_its_line() {
        let error = ChatTemplate::new("a\n{% for x in %}", String::new(), String::new()).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        let error = render("{{ messages.nothing.deeper }}", &[]).unwrap_err();
        assert!(matches!(error, Error::Template(_)), "{error}");
    }
}

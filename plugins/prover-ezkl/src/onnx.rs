//! As much of the ONNX format as the circuits need: reading what goes in and out, and adding a node.
//!
//! An ONNX file is one protocol-buffers message, `ModelProto`, and such messages have a property that makes a graph easy to extend:
//! a second `graph` field that follows the first is merged into it, list by list. So what is added to an operator's model is
//! appended to its bytes, and the model itself stays as it is.
//! Field numbers: <https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>.

use crate::error::EzklError;

const INT64: u64 = 7;

/// The inputs and outputs that a graph declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    pub inputs: Vec<Tensor>,
    pub outputs: Vec<Tensor>,
}

/// One of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    pub dims: Vec<Dim>,
}

/// One dimension of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    Fixed(u64),
    /// A dimension that the model leaves open, such as the number of examples. It is 1 in a circuit.
    Open(String),
}

impl Tensor {
    /// How many numbers it holds in a circuit.
    pub fn len(&self) -> usize {
        self.dims.iter().map(|dim| if let Dim::Fixed(size) = dim { *size as usize } else { 1 }).product()
    }
}

/// Reads what goes in and out of a model.
pub fn shape(model: &[u8]) -> Result<Shape, EzklError> {
    let mut shape = Shape { inputs: Vec::new(), outputs: Vec::new() };
    let mut constants = Vec::new();
    for graph in messages(model, 7)? {
        for constant in messages(graph, 5)? {
            constants.extend(texts(constant, 8)?);
        }
        for input in messages(graph, 11)? {
            shape.inputs.push(tensor(input)?);
        }
        for output in messages(graph, 12)? {
            shape.outputs.push(tensor(output)?);
        }
    }
    // Older models list their constants among the inputs.
    shape.inputs.retain(|input| !constants.contains(&input.name));
    Ok(shape)
}

/// The circuit of a commitment: of `length` numbers the first one is told.
pub fn first_of(length: u64) -> Vec<u8> {
    let mut model = number(1, 8);
    model.extend(field(7, &pick("preimage", length, "subject", 1)));
    model.extend(field(8, &number(2, 13)));
    model
}

/// A model with one more input of `length` numbers, `about`, of which the first `told` go out again unchanged, as `subject`.
pub fn bound(model: &[u8], length: u64, told: u64) -> Vec<u8> {
    let mut whole = model.to_vec();
    whole.extend(field(7, &pick(ABOUT, length, SUBJECT, told)));
    whole
}

/// Names of the input and the output that [`bound`] adds.
pub const ABOUT: &str = "fabstir.about";
pub const SUBJECT: &str = "fabstir.subject";

/// A graph that picks the first numbers of an input. Integers, which a circuit does not scale.
fn pick(input: &str, length: u64, output: &str, told: u64) -> Vec<u8> {
    let positions = format!("{output}.positions");
    let mut node = field(1, input.as_bytes());
    node.extend(field(1, positions.as_bytes()));
    node.extend(field(2, output.as_bytes()));
    node.extend(field(3, output.as_bytes()));
    node.extend(field(4, b"Gather"));
    let mut constant = number(1, told);
    constant.extend(number(2, INT64));
    constant.extend(field(8, positions.as_bytes()));
    constant.extend(field(9, &(0..told).flat_map(u64::to_le_bytes).collect::<Vec<u8>>()));
    let mut graph = field(1, &node);
    graph.extend(field(2, b"fabstir"));
    graph.extend(field(5, &constant));
    graph.extend(field(11, &row(input, length)));
    graph.extend(field(12, &row(output, told)));
    graph
}

/// The description of a tensor with one dimension.
fn row(name: &str, length: u64) -> Vec<u8> {
    let shape = field(1, &number(1, length));
    let kind = [number(1, INT64), field(2, &shape)].concat();
    [field(1, name.as_bytes()), field(2, &field(1, &kind))].concat()
}

fn field(id: u64, bytes: &[u8]) -> Vec<u8> {
    let mut written = varint(id << 3 | 2);
    written.extend(varint(bytes.len() as u64));
    written.extend(bytes);
    written
}

fn number(id: u64, value: u64) -> Vec<u8> {
    [varint(id << 3), varint(value)].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn tensor(info: &[u8]) -> Result<Tensor, EzklError> {
    let mut found = Tensor { name: texts(info, 1)?.pop().unwrap_or_default(), dims: Vec::new() };
    for dim in nested(info, &[2, 1, 2, 1])? {
        let fixed = fields(dim)?
            .into_iter()
            .find_map(|(id, value)| if let (1, Value::Number(size)) = (id, value) { Some(size) } else { None });
        found.dims.push(match fixed {
            Some(size) => Dim::Fixed(size),
            None => Dim::Open(texts(dim, 2)?.pop().unwrap_or_default()),
        });
    }
    Ok(found)
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message. Numbers of a fixed width are passed over: nothing that is read here has them.
fn fields(mut message: &[u8]) -> Result<Vec<(u64, Value<'_>)>, EzklError> {
    fn take<'a>(message: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = message.split_at_checked(usize::try_from(length).ok()?)?;
        *message = rest;
        Some(taken)
    }
    fn read(message: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = take(message, 1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
    let mut found = Vec::new();
    let mut next = || {
        let tag = read(&mut message)?;
        match tag & 7 {
            0 => found.push((tag >> 3, Value::Number(read(&mut message)?))),
            1 => drop(take(&mut message, 8)?),
            2 => {
                let length = read(&mut message)?;
                found.push((tag >> 3, Value::Bytes(take(&mut message, length)?)));
            }
            5 => drop(take(&mut message, 4)?),
            _ => return None,
        }
        Some(message.is_empty())
    };
    loop {
        match next() {
            Some(true) => return Ok(found),
            Some(false) => {}
            None => return Err(EzklError::NotOnnx),
        }
    }
}

fn messages(message: &[u8], wanted: u64) -> Result<Vec<&[u8]>, EzklError> {
    if message.is_empty() {
        return Ok(Vec::new());
    }
    let found = fields(message)?.into_iter();
    Ok(found
        .filter_map(|(id, value)| if let Value::Bytes(bytes) = value { (id == wanted).then_some(bytes) } else { None })
        .collect())
}

/// What a path of fields leads to.
fn nested<'a>(message: &'a [u8], path: &[u64]) -> Result<Vec<&'a [u8]>, EzklError> {
    let mut reached = vec![message];
    for id in path {
        reached = reached.into_iter().map(|message| messages(message, *id)).collect::<Result<Vec<_>, _>>()?.concat();
    }
    Ok(reached)
}

fn texts(message: &[u8], wanted: u64) -> Result<Vec<String>, EzklError> {
    Ok(messages(message, wanted)?.into_iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_read_back_beside_what_was_there() {
        let fixed = |name: &str, size| Tensor { name: name.into(), dims: vec![Dim::Fixed(size)] };
        let model = first_of(7);
        assert_eq!(shape(&model).unwrap(), Shape { inputs: vec![fixed("preimage", 7)], outputs: vec![fixed("subject", 1)] });
        let both = shape(&bound(&model, 24, 12)).unwrap();
        assert_eq!(both.inputs, [fixed("preimage", 7), fixed(ABOUT, 24)]);
        assert_eq!(both.outputs, [fixed("subject", 1), fixed(SUBJECT, 12)]);
    }

    #[test]
    fn a_broken_file_is_an_error_at_every_length() {
        let model = first_of(7);
        for end in 0..model.len() {
            let _ = shape(&model[..end]);
        }
        assert!(matches!(shape(b"not a model at all"), Err(EzklError::NotOnnx)));
    }
}

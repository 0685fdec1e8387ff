//! What nodes and clients sign for the contracts: EIP-712 payloads of offers and vouchers.
//!
//! A payload is `0x19 0x01`, the market's domain, and the hash of the struct; the signature is over its Keccak-256. The domain holds
//! chain and contract, the struct both parties, so that nothing that is signed here counts anywhere else.

use ethers::abi::{Token, encode};
use ethers::types::{Address, RecoveryMessage, Signature as EcdsaSignature, U256};
use ethers::utils::keccak256;
use fabstir_plugin_api::prelude::*;

use crate::hex;

const DOMAIN: &str = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)";
const OFFER: &str = "Offer(address host,address client,bytes32 modelId,address token,uint128 priceInPerMTok,uint128 priceOutPerMTok,\
                     uint64 expiry,uint64 settleWindowSecs,uint64 offerValidUntil,bytes32 nonce)";
const VOUCHER: &str = "Voucher(bytes32 sessionId,address host,uint128 cumulativeAmount,uint64 cumulativeIn,uint64 cumulativeOut,\
                       bytes32 transcriptRoot)";

/// Half of the order of secp256k1: a signature whose s is above it has a twin below, and the contracts take the lower one alone.
const HALF_ORDER: &str = "7fffffffffffffffffffffffffffffff5d576e7357a4501ddfe92f46681b20a0";

/// What every payload of the market begins with, after 0x19 0x01.
pub fn domain(chain_id: u64, escrow: Address) -> [u8; 32] {
    let text = |text: &str| Token::FixedBytes(keccak256(text).to_vec());
    keccak256(encode(&[text(DOMAIN), text("fabstir"), text("1"), Token::Uint(chain_id.into()), Token::Address(escrow)]))
}

pub fn offer(domain: [u8; 32], terms: &Terms) -> Result<Payload> {
    let Terms { host, client, model, coin, price_input_per_mtok, price_output_per_mtok, .. } = terms;
    let fields = [
        account("host", host)?,
        account("client", client)?,
        hash("model", model)?,
        account("coin", coin)?,
        Token::Uint(price_input_per_mtok.0.into()),
        Token::Uint(price_output_per_mtok.0.into()),
        Token::Uint(terms.expires_s.into()),
        Token::Uint(terms.settle_window_s.into()),
        Token::Uint(terms.valid_until_s.into()),
        hash("nonce", &terms.nonce)?,
    ];
    Ok(payload(domain, OFFER, fields))
}

/// The name of a model on the chain: that of its file's digest, with no template of its own.
///
/// # Errors
/// `InvalidArgument` unless it is 64 hexadecimal digits.
pub fn model_id(digest: &str) -> Result<ModelId> {
    let file = hex::hash("digest", &format!("0x{digest}"))?;
    Ok(hex::hash_text(keccak256(encode(&[Token::FixedBytes(file.to_vec()), Token::FixedBytes(vec![0; 32])]))))
}

/// The name that the contract gives a session.
pub fn session_id(chain_id: u64, escrow: Address, terms: &Terms) -> Result<SessionId> {
    let parts = [
        Token::Uint(chain_id.into()),
        Token::Address(escrow),
        account("client", &terms.client)?,
        account("host", &terms.host)?,
        hash("nonce", &terms.nonce)?,
    ];
    Ok(hex::hash_text(keccak256(encode(&parts))))
}

pub fn voucher(domain: [u8; 32], voucher: &Voucher) -> Result<Payload> {
    let fields = [
        hash("session", &voucher.session)?,
        account("host", &voucher.host)?,
        Token::Uint(voucher.amount.0.into()),
        Token::Uint(voucher.input_tokens.into()),
        Token::Uint(voucher.output_tokens.into()),
        hash("transcript", &voucher.transcript)?,
    ];
    Ok(payload(domain, VOUCHER, fields))
}

fn payload<const N: usize>(domain: [u8; 32], form: &str, fields: [Token; N]) -> Payload {
    let mut tokens = vec![Token::FixedBytes(keccak256(form).to_vec())];
    tokens.extend(fields);
    [&[0x19, 0x01], &domain[..], &keccak256(encode(&tokens))].concat()
}

fn account(what: &str, text: &str) -> Result<Token> {
    hex::account(what, text).map(Token::Address)
}

fn hash(what: &str, text: &str) -> Result<Token> {
    hex::hash(what, text).map(|hash| Token::FixedBytes(hash.to_vec()))
}

/// Reads a signature in the one form that the contracts take.
///
/// # Errors
/// `InvalidArgument` unless it has 65 bytes, ends with 27 or 28, and s is the lower of the two.
pub fn signature(bytes: &[u8]) -> Result<EcdsaSignature> {
    let wrong = |why: &str| PluginError::invalid(format!("a signature {why}"));
    let signature = EcdsaSignature::try_from(bytes).map_err(|_| wrong("has 65 bytes: r, s and 27 or 28"))?;
    if !matches!(bytes.last(), Some(27 | 28)) {
        return Err(wrong("ends with 27 or 28"));
    }
    let half = U256::from_str_radix(HALF_ORDER, 16).expect("the constant is hexadecimal");
    if signature.s > half {
        return Err(wrong("has the lower of the two values that s can have"));
    }
    Ok(signature)
}

/// Who signed these bytes, by the Keccak-256 of them.
pub fn signer(payload: &[u8], bytes: &[u8]) -> Result<Address> {
    let message = RecoveryMessage::Hash(keccak256(payload).into());
    signature(bytes)?.recover(message).map_err(|_| PluginError::invalid("the signature is nobody's"))
}

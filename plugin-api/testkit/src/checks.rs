//! The checks: what every plugin promises, and what its kinds promise.

use std::future::Future;
use std::pin::Pin;

use anyhow::Result;

use crate::harness::Harness;
use crate::report::Outcome;

mod chain;
mod inference;
mod lifecycle;
mod prover;
mod storage;
mod streams;
mod transport;

/// What a check does, in a process of its own.
type Run = for<'a> fn(&'a Harness) -> Pin<Box<dyn Future<Output = Result<Outcome>> + 'a>>;

/// One promise that can be checked on any built library.
pub struct Check {
    /// The name that one types.
    pub name: &'static str,
    /// The kind whose plugins it applies to; `None` for all.
    pub kind: Option<&'static str>,
    /// The promise, in one sentence.
    pub promise: &'static str,
    /// How many times the usual time it may take.
    pub patience: u32,
    pub(crate) run: Run,
}

macro_rules! check {
    ($kind:expr, $name:literal, $run:path, $promise:literal) => {
        check!($kind, $name, $run, $promise, 1)
    };
    ($kind:expr, $name:literal, $run:path, $promise:literal, $patience:literal) => {
        Check { name: $name, kind: $kind, promise: $promise, patience: $patience, run: |harness| Box::pin($run(harness)) }
    };
}

const CHAIN: Option<&str> = Some("chain");
const INFERENCE: Option<&str> = Some("inference");
const PROVER: Option<&str> = Some("prover");
const STORAGE: Option<&str> = Some("storage");
const TRANSPORT: Option<&str> = Some("transport");

pub(crate) static CHECKS: &[Check] = &[
    check!(None, "load", lifecycle::load, "The library opens, connects, and says what its manifest says."),
    check!(
        None,
        "describe-is-stable",
        lifecycle::describe_is_stable,
        "`describe` gives the same answer every time, in every instance."
    ),
    check!(
        None,
        "config-schema-refuses-unknown-keys",
        lifecycle::config_schema_refuses_unknown_keys,
        "A key that the schema does not know is refused by name, and the given configuration is accepted."
    ),
    check!(
        None,
        "unconfigured-is-unavailable",
        lifecycle::unconfigured_is_unavailable,
        "No method of a kind runs before `configure`."
    ),
    check!(None, "declared-methods-work", lifecycle::declared_methods_work, "Every method in `describe` does its work."),
    check!(
        None,
        "undeclared-are-unimplemented",
        lifecycle::undeclared_are_unimplemented,
        "Every method of a kind that is not in `describe` answers `Unimplemented`."
    ),
    check!(
        None,
        "unknown-method-is-unimplemented",
        lifecycle::unknown_method_is_unimplemented,
        "Methods and kinds of a later version answer `Unimplemented`."
    ),
    check!(
        None,
        "panic-contained",
        lifecycle::panic_contained,
        "Arguments that cannot be read end their call with an error, and nothing else."
    ),
    check!(None, "garbage-frames-are-survived", lifecycle::garbage_frames_are_survived, "Frames of nonsense change nothing."),
    check!(
        None,
        "hundred-concurrent-calls",
        lifecycle::hundred_concurrent_calls,
        "A hundred calls at once are all answered, each its own."
    ),
    check!(
        None,
        "cancel-before",
        streams::cancel_before,
        "A stream cancelled before its first item sends none after the cancel."
    ),
    check!(
        None,
        "cancel-during",
        streams::cancel_during,
        "A stream cancelled under way stops, and what it held is free again.",
        2
    ),
    check!(None, "cancel-after", streams::cancel_after, "A cancel that comes after the end changes nothing."),
    check!(
        None,
        "slow-consumer-keeps-memory-flat",
        streams::slow_consumer_keeps_memory_flat,
        "A stream that is not read waits, and piles up nothing."
    ),
    check!(None, "deadline-honoured", streams::deadline_honoured, "A call that is late ends with `DeadlineExceeded` by itself."),
    check!(
        None,
        "drain-refuses-and-waits",
        streams::drain_refuses_and_waits,
        "`drain` refuses new calls and returns when the running ones end."
    ),
    check!(
        None,
        "shutdown-leaves-no-thread",
        lifecycle::shutdown_leaves_no_thread,
        "An instance that has ended has no thread left."
    ),
    check!(
        None,
        "thousand-starts-without-growth",
        lifecycle::thousand_starts_without_growth,
        "A thousand instances, started and ended, leave no memory, thread or file behind.",
        8
    ),
    check!(
        CHAIN,
        "network-is-configured",
        chain::network_is_configured,
        "Which chain it is, what is signed and who has signed it need no chain to be there."
    ),
    check!(
        CHAIN,
        "unreachable-is-an-error",
        chain::unreachable_is_an_error,
        "What cannot be read is `Unavailable` in time; what is ordered then waits."
    ),
    check!(
        CHAIN,
        "payload-binds-every-field",
        chain::payload_binds_every_field,
        "What is signed changes with each field, and has no room for what a contract cannot hold."
    ),
    check!(
        CHAIN,
        "signer-is-recovered",
        chain::signer_is_recovered,
        "A signature leads to who made it over these bytes; what is no signature is refused."
    ),
    check!(
        CHAIN,
        "one-account-at-a-time",
        chain::one_account_at_a_time,
        "One account is acted for, by one process, until its stream is dropped."
    ),
    check!(
        CHAIN,
        "unknown-is-not-found",
        chain::unknown_is_not_found,
        "A job, a session or an order that never was is `NotFound`."
    ),
    check!(
        CHAIN,
        "order-is-carried-out",
        chain::order_is_carried_out,
        "An order comes into a block, is told and read back, and costs what it says.",
        2
    ),
    check!(
        CHAIN,
        "same-key-is-one-order",
        chain::same_key_is_one_order,
        "What is ordered twice under one key is carried out once.",
        2
    ),
    check!(
        CHAIN,
        "order-survives-restart",
        chain::order_survives_restart,
        "An order outlives its instance at every step, and is still carried out once.",
        3
    ),
    check!(CHAIN, "refusal-is-final", chain::refusal_is_final, "What is not signed is not sent, and holds up nothing after it."),
    check!(
        CHAIN,
        "wrong-signature-is-refused",
        chain::wrong_signature_is_refused,
        "A signature that is not the account's is refused, and the order waits for the right one."
    ),
    check!(
        CHAIN,
        "revert-is-told",
        chain::revert_is_told,
        "What the contract refuses is quoted as refused, and never told as carried out.",
        2
    ),
    check!(
        CHAIN,
        "vouchers-are-paid",
        chain::vouchers_are_paid,
        "The contract takes what node and client sign, pays once what is promised, and returns the rest.",
        2
    ),
    check!(
        CHAIN,
        "events-resume",
        chain::events_resume,
        "From any cursor, the events that followed come again, in order and without a gap.",
        2
    ),
    check!(
        INFERENCE,
        "models-and-load",
        inference::models_and_load,
        "Models load, say what they take, and can be loaded again and unloaded."
    ),
    check!(
        INFERENCE,
        "generate-ends-with-done",
        inference::generate_ends_with_done,
        "An answer is text and then exactly one `Done`."
    ),
    check!(INFERENCE, "usage-adds-up", inference::usage_adds_up, "The tokens of the pieces add up to the usage."),
    check!(INFERENCE, "stop-strings", inference::stop_strings, "A stop text ends the answer and is not part of it."),
    check!(INFERENCE, "max-tokens", inference::max_tokens, "An answer has no more than `max_tokens` and says when it was cut."),
    check!(INFERENCE, "seed-repeats", inference::seed_repeats, "The same seed and request give the same answer."),
    check!(
        INFERENCE,
        "too-long-is-refused",
        inference::too_long_is_refused,
        "A request over the context is refused as `TooLong`."
    ),
    check!(
        INFERENCE,
        "unknown-model-is-not-found",
        inference::unknown_model_is_not_found,
        "A model that is not there is `NotFound`."
    ),
    check!(
        INFERENCE,
        "parallel-generations",
        inference::parallel_generations,
        "As many answers run at once as `load` says; one more is answered or told when to come back.",
        2
    ),
    check!(
        PROVER,
        "statements-are-told-in-full",
        prover::statements_are_told_in_full,
        "Every statement says what it shows, what it does not and whom one trusts, the same every time."
    ),
    check!(
        PROVER,
        "program-outlives-the-instance",
        prover::program_outlives_the_instance,
        "What is prepared has a program, is not made again, and is the same after a restart.",
        2
    ),
    check!(
        PROVER,
        "proof-binds-what-it-is-about",
        prover::proof_binds_what_it_is_about,
        "A proof holds for what it is about; with any byte or any part of that changed it does not.",
        2
    ),
    check!(
        PROVER,
        "false-task-is-refused",
        prover::false_task_is_refused,
        "A task that is none of the statement's is refused, and disturbs no other.",
        2
    ),
    check!(
        PROVER,
        "abandoned-work-ends",
        prover::abandoned_work_ends,
        "Work that nobody waits for ends soon, and leaves nothing half made.",
        2
    ),
    check!(
        PROVER,
        "work-is-told-and-measured",
        prover::work_is_told_and_measured,
        "Stages come before the proof; estimates have figures for what ran here, and for nothing else.",
        2
    ),
    check!(
        PROVER,
        "damaged-keys-are-told",
        prover::damaged_keys_are_told,
        "Kept keys that have changed are `Corrupt` once, set aside and made anew.",
        2
    ),
    check!(
        PROVER,
        "verifier-is-ready-to-deploy",
        prover::verifier_is_ready_to_deploy,
        "The contract of a statement is there once it is prepared, with its arguments.",
        2
    ),
    check!(
        STORAGE,
        "put-get-round-trip",
        storage::put_get_round_trip,
        "Bytes come back as they went in, under their BLAKE3 hash."
    ),
    check!(STORAGE, "ranges", storage::ranges, "A part of a blob is that part, cut at the end."),
    check!(
        STORAGE,
        "missing-is-not-found",
        storage::missing_is_not_found,
        "A blob that is not there is `NotFound`, and no id leads elsewhere."
    ),
    check!(
        STORAGE,
        "wrong-expectation-stores-nothing",
        storage::wrong_expectation_stores_nothing,
        "Bytes that are not those announced are refused and not stored."
    ),
    check!(STORAGE, "put-twice", storage::put_twice, "Putting a stored blob again succeeds, also at the same time."),
    check!(STORAGE, "delete", storage::delete, "A deleted blob is gone, and `delete` says whether it was there."),
    check!(STORAGE, "list-in-order", storage::list_in_order, "`list` gives every blob once, in order of id."),
    check!(
        STORAGE,
        "large-blob-in-bounded-memory",
        storage::large_blob_in_bounded_memory,
        "A blob larger than the memory allowed for it goes in and comes out.",
        3
    ),
    check!(
        STORAGE,
        "cancelled-put-stores-nothing",
        storage::cancelled_put_stores_nothing,
        "A put that is given up, or whose bytes fail, stores nothing."
    ),
    check!(
        STORAGE,
        "vectors-round-trip",
        storage::vectors::round_trip,
        "Vectors are found by their direction, come with their data, and are replaced by their key."
    ),
    check!(
        STORAGE,
        "vectors-nearest-first",
        storage::vectors::nearest_first,
        "Of a few hundred vectors the nearest are found, nearest first, with their exact similarity."
    ),
    check!(
        STORAGE,
        "vectors-namespaces-are-apart",
        storage::vectors::namespaces_are_apart,
        "Namespaces of vectors share nothing: no key, no length, no end."
    ),
    check!(
        STORAGE,
        "vectors-deleted-are-never-found",
        storage::vectors::deleted_are_never_found,
        "Deleted vectors are not found again, and are counted once."
    ),
    check!(
        STORAGE,
        "vectors-senseless-is-refused",
        storage::vectors::senseless_is_refused,
        "Vectors of another length, of zeros, of no numbers or too long are refused, and none beside them is stored."
    ),
    check!(
        STORAGE,
        "vectors-survive-restart",
        storage::vectors::survive_restart,
        "Vectors, and that they were deleted, outlive their instance."
    ),
    check!(
        STORAGE,
        "pointers-read-back",
        storage::pointers::read_back,
        "A pointer that was set comes back as it was signed; one that was not is `NotFound`."
    ),
    check!(
        STORAGE,
        "pointers-older-is-refused",
        storage::pointers::older_is_refused,
        "A revision that is not newer is refused by naming the known one, and moves nothing."
    ),
    check!(
        STORAGE,
        "pointers-forged-is-refused",
        storage::pointers::forged_is_refused,
        "What its key has not signed moves no pointer."
    ),
    check!(
        STORAGE,
        "pointers-senseless-is-refused",
        storage::pointers::senseless_is_refused,
        "Keys that are none, and revisions and data beyond the bounds, are refused."
    ),
    check!(STORAGE, "pointers-survive-restart", storage::pointers::survive_restart, "Pointers outlive their instance."),
    check!(
        TRANSPORT,
        "join-and-dial",
        transport::join_and_dial,
        "A node joins once, is dialled by its address, and says who comes and goes."
    ),
    check!(
        TRANSPORT,
        "peers-are-authenticated",
        transport::peers_are_authenticated,
        "A peer's id follows from its key, is what others see, and is not taken for another's."
    ),
    check!(
        TRANSPORT,
        "conversation-round-trip",
        transport::conversation_round_trip,
        "Messages arrive whole and in order, in both directions."
    ),
    check!(
        TRANSPORT,
        "messages-keep-their-bounds",
        transport::messages_keep_their_bounds,
        "Messages of 1 byte to 1 MiB arrive as they were sent; any other ends the conversation."
    ),
    check!(TRANSPORT, "half-close", transport::half_close, "Either direction may end while the other goes on."),
    check!(
        TRANSPORT,
        "drop-gives-up",
        transport::drop_gives_up,
        "Who drops a conversation, or ends it with an error, gives up both directions, and the peer is told."
    ),
    check!(
        TRANSPORT,
        "slow-peer-holds-back",
        transport::slow_peer_holds_back,
        "A peer that does not read holds its sender back, piles up nothing, and disturbs no other conversation."
    ),
    check!(
        TRANSPORT,
        "busy-is-told",
        transport::busy_is_told,
        "Conversations that nobody accepts are refused as busy: at once where too many wait, else after 10 seconds."
    ),
    check!(
        TRANSPORT,
        "unknown-protocol-is-unimplemented",
        transport::unknown_protocol_is_unimplemented,
        "A protocol that nobody listens for is `Unimplemented`, and has one listener at a time."
    ),
    check!(
        TRANSPORT,
        "many-conversations",
        transport::many_conversations,
        "A hundred conversations at once between two nodes all end well, each with its own messages."
    ),
    check!(
        TRANSPORT,
        "advertise-find-withdraw",
        transport::advertise_find_withdraw,
        "What a node advertises is found by others, who reach it by its id alone."
    ),
    check!(TRANSPORT, "find-sees-many", transport::find_sees_many, "All of 32 nodes that offer the same are found.", 2),
    check!(
        TRANSPORT,
        "visitor-cannot-advertise",
        transport::visitor_cannot_advertise,
        "A visitor has no address, advertises nothing and is not found."
    ),
];

/// A small call of each kind that the plugin provides, for checks whose promise is not about a kind.
async fn exercise(harness: &Harness, instance: &crate::harness::Instance) -> Result<()> {
    if harness.provides("chain") {
        chain::exercise(instance).await?;
    }
    if harness.provides("inference") {
        inference::exercise(instance).await?;
    }
    if harness.provides("prover") {
        prover::exercise(instance).await?;
    }
    if harness.provides("storage") {
        storage::exercise(instance).await?;
    }
    if harness.provides("transport") {
        transport::exercise(harness, instance).await?;
    }
    Ok(())
}

// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Ledger} from "./Ledger.sol";
import {ProofHub} from "./ProofHub.sol";
import {IVerifier} from "./interfaces/IVerifier.sol";
import {IArbiter} from "./interfaces/IArbiter.sol";

/// @title Posted jobs
/// @notice A client posts a job with its price; the first node to claim it locks a bond, delivers, proves if the terms ask for it, and is
/// paid when the client accepts or its time to object is over. Every state that is not final has a deadline, after which anyone may
/// call `expire`. Nothing depends on the client, the host or an arbiter coming back.
abstract contract JobLane is Ledger {
    uint256 public constant MAX_INPUT_REF_BYTES = 16 * 1024;
    uint256 public constant MAX_RESULT_REF_BYTES = 512;
    uint8 public constant MAX_ATTEMPTS = 8;
    uint16 public constant MAX_BPS = 10_000;
    /// @notice `abandonJob` costs one part in this many of the bond; timing out costs all of it.
    uint128 public constant ABANDON_DIVISOR = 10;

    /// @notice The verifiers that new jobs may name.
    ProofHub public immutable proofs;

    enum JobState {
        None,
        Open,
        Claimed,
        Delivered,
        Proven,
        Challenged,
        Settled,
        Refunded
    }

    /// @notice Why a job ended, or a claim was lost.
    enum Why {
        None,
        Cancelled,
        NotClaimed,
        Abandoned,
        NotDelivered,
        NotProven,
        Accepted,
        NotChallenged,
        Ruled,
        NotRuled
    }

    /// @param modelId What must run; see ModelRegistry. It need not be registered there.
    /// @param token What is paid with; zero is the native coin.
    /// @param maxAmount Units of `token` put in, and the most that is paid.
    /// @param priceInPerMTok Units of `token` per million prompt tokens.
    /// @param priceOutPerMTok Units of `token` per million generated tokens.
    /// @param claimBy Unix second until which a node may claim, at most 30 days ahead.
    /// @param deliverSecs Time from claim to result. This and the next three are 10 seconds to 30 days where they apply.
    /// @param proveSecs Time from result to proof; used if `proofKind` is not 0.
    /// @param challengeSecs Time from result (or proof) in which the client may object.
    /// @param resolveSecs Time from challenge to ruling, or longer where a proof is still owed; used if there is an arbiter.
    /// @param maxAttempts How many nodes may try, 1 to 8.
    /// @param hostBond Wei locked from the claiming node's stake.
    /// @param challengeBond Wei the client puts up to object.
    /// @param proofKind 0 for none, otherwise a kind that ProofHub knows with `programId`.
    /// @param arbiter Who may rule on a challenge; zero means that a result cannot be challenged.
    struct JobTerms {
        bytes32 modelId;
        address token;
        uint128 maxAmount;
        uint128 priceInPerMTok;
        uint128 priceOutPerMTok;
        uint64 maxInTokens;
        uint64 maxOutTokens;
        uint64 claimBy;
        uint64 deliverSecs;
        uint64 proveSecs;
        uint64 challengeSecs;
        uint64 resolveSecs;
        uint8 maxAttempts;
        uint128 hostBond;
        uint128 challengeBond;
        uint8 proofKind;
        bytes32 programId;
        address arbiter;
    }

    /// @param deadline Last second of the present state: claimBy, deliverBy, proveBy, challengeBy or resolveBy.
    /// @param attempts Claims so far.
    /// @param host The node that holds, or last held, the claim.
    /// @param proven Whether a proof was accepted.
    /// @param tracedAt The block in which a result with a trace was delivered; zero if there is none.
    /// @param verifier Copied from ProofHub when posted; zero if `proofKind` is 0.
    struct Job {
        address client;
        uint64 deadline;
        JobState state;
        uint8 attempts;
        uint8 maxAttempts;
        uint8 proofKind;
        address token;
        uint64 claimBy;
        uint32 deliverSecs;
        address arbiter;
        uint32 proveSecs;
        uint32 challengeSecs;
        uint32 resolveSecs;
        address host;
        bool proven;
        uint64 tracedAt;
        address verifier;
        uint128 maxAmount;
        uint128 hostBond;
        uint128 priceInPerMTok;
        uint128 priceOutPerMTok;
        uint64 maxInTokens;
        uint64 maxOutTokens;
        uint128 challengeBond;
        uint64 inTokens;
        uint64 outTokens;
        bytes32 modelId;
        bytes32 programId;
        bytes32 inputCommitment;
        bytes32 outputCommitment;
        bytes32 trace;
    }

    /// @notice The id that the next job gets; ids count from 1.
    uint256 public nextJobId = 1;
    mapping(uint256 jobId => Job) private _jobs;
    /// @notice Nodes that failed a job and may not claim it again.
    mapping(uint256 jobId => mapping(address node => bool)) public excluded;

    event JobPosted(
        uint256 indexed jobId,
        address indexed client,
        bytes32 indexed modelId,
        JobTerms terms,
        bytes32 inputCommitment,
        string inputRef,
        address verifier
    );
    event JobClaimed(uint256 indexed jobId, address indexed host, uint64 deliverBy, uint8 attempt);
    /// @notice A node lost its claim; when `reopened`, others may claim until the job's claimBy.
    event ClaimLost(uint256 indexed jobId, address indexed host, uint8 attempt, uint128 slashed, uint8 why, bool reopened);
    event ResultSubmitted(
        uint256 indexed jobId,
        address indexed host,
        bytes32 outputCommitment,
        bytes32 trace,
        uint64 inTokens,
        uint64 outTokens,
        string resultRef,
        uint8 attempt,
        uint64 deadline
    );
    event ProofAccepted(uint256 indexed jobId, uint8 kind, bytes32 programId, bytes32 proofHash, uint64 deadline);
    event Challenged(uint256 indexed jobId, address indexed by, uint8 reason, bytes32 evidenceHash, uint64 resolveBy);
    /// @notice A challenge ended. `slashed` wei of the loser's bond went to the winner.
    event ChallengeEnded(uint256 indexed jobId, bool hostWins, uint128 slashed, uint8 why);
    event JobSettled(
        uint256 indexed jobId, address indexed host, address payout, uint128 toHost, uint128 toClient, uint8 attempt, uint8 why
    );
    event JobRefunded(uint256 indexed jobId, address indexed client, uint128 amount, uint8 attempt, uint8 why);

    error JobWrongState(uint256 jobId, JobState state);
    error NotJobClient(address caller, address client);
    error NotJobHost(address caller, address host);
    error NotANode(address caller);
    error NodeExcluded(uint256 jobId, address node);
    error ZeroAmount();
    error ClaimByOutOfBounds(uint256 claimBy, uint256 min, uint256 max);
    error AttemptsOutOfBounds(uint256 maxAttempts, uint256 max);
    error UnknownVerifier(uint8 proofKind, bytes32 programId);
    error RefTooLong(uint256 bytes_, uint256 max);
    error DeadlinePassed(uint256 now_, uint256 deadline);
    error DeadlineAhead(uint256 now_, uint256 deadline);
    error TooManyTokens(bytes32 field, uint256 tokens, uint256 max);
    error NoProofWanted(uint256 jobId);
    error AlreadyProven(uint256 jobId);
    error WrongStatement(bytes32 inProof, bytes32 expected);
    error ProofRejected(uint256 jobId, address verifier);
    error NoArbiter(uint256 jobId);
    error BadRuling(uint256 slashBps, uint256 max);

    constructor(ProofHub proofs_) {
        if (address(proofs_) == address(0)) revert ZeroAddress();
        proofs = proofs_;
    }

    /// @notice Posts a job. Called by the client with `maxAmount` (native coin as `msg.value`, a token by allowance). Afterwards it is
    /// Open until it is claimed, cancelled, or `claimBy` is over. Fails when paused and when a term is out of bounds.
    /// @param inputCommitment Hash that fixes the input.
    /// @param inputRef Where the input is, or the (encrypted) input itself; at most 16 KiB.
    function postJob(JobTerms calldata t, bytes32 inputCommitment, string calldata inputRef)
        external
        payable
        nonReentrant
        whenNotPaused
        returns (uint256 jobId)
    {
        address verifier = _checkTerms(t);
        if (bytes(inputRef).length > MAX_INPUT_REF_BYTES) revert RefTooLong(bytes(inputRef).length, MAX_INPUT_REF_BYTES);
        _pull(t.token, t.maxAmount);

        jobId = nextJobId++;
        _store(_jobs[jobId], t, verifier, inputCommitment);
        emit JobPosted(jobId, msg.sender, t.modelId, t, inputCommitment, inputRef, verifier);
    }

    /// @notice Takes an Open job back; the whole amount is the client's credit. Called by the client.
    function cancelJob(uint256 jobId) external {
        Job storage j = _inState(jobId, JobState.Open);
        _onlyClient(j);
        _refund(jobId, j, Why.Cancelled);
    }

    /// @notice Claims an Open job for the caller's node; its bond is locked and the time to deliver starts. Called by the hot key of an
    /// active node that has not failed this job before. Of several callers the first wins, the others fail with `JobWrongState`.
    function claimJob(uint256 jobId) external {
        Job storage j = _inState(jobId, JobState.Open);
        _notOverdue(j);
        address node = nodes.nodeOf(msg.sender);
        if (node == address(0)) revert NotANode(msg.sender);
        if (excluded[jobId][node]) revert NodeExcluded(jobId, node);
        uint8 attempt = j.attempts + 1;
        uint64 deliverBy = uint64(block.timestamp) + j.deliverSecs;
        j.state = JobState.Claimed;
        j.attempts = attempt;
        j.host = node;
        j.deadline = deliverBy;
        nodes.lockBond(node, j.hostBond);
        emit JobClaimed(jobId, node, deliverBy, attempt);
    }

    /// @notice Gives a claimed job back. Called by the host before its deadline. A tenth of the bond goes to the client, the rest is free
    /// again, and the job is Open for others or, if no attempt or no time is left, Refunded.
    /// @dev Not after the deadline, or a host could always escape the full slash just ahead of `expire`.
    function abandonJob(uint256 jobId) external {
        Job storage j = _inState(jobId, JobState.Claimed);
        _onlyHost(j);
        _notOverdue(j);
        _loseClaim(jobId, j, j.hostBond / ABANDON_DIVISOR, Why.Abandoned);
    }

    /// @notice Delivers. Called by the host before its deadline. The counts fix the payment; they may not exceed the terms.
    /// Afterwards the job is Delivered: the host has `proveSecs` to prove if the terms ask for a proof, otherwise the client has
    /// `challengeSecs` to object.
    /// @param trace The root over what a verifier may ask for at positions that nobody knows yet, one leaf for each token of the output;
    /// zero if nothing of that kind is to be proven.
    /// @param resultRef Where the result is; at most 512 bytes.
    function submitResult(
        uint256 jobId,
        bytes32 outputCommitment,
        bytes32 trace,
        uint64 inTokens,
        uint64 outTokens,
        string calldata resultRef
    ) external {
        Job storage j = _inState(jobId, JobState.Claimed);
        _onlyHost(j);
        _notOverdue(j);
        if (inTokens > j.maxInTokens) revert TooManyTokens("inTokens", inTokens, j.maxInTokens);
        if (outTokens > j.maxOutTokens) revert TooManyTokens("outTokens", outTokens, j.maxOutTokens);
        if (bytes(resultRef).length > MAX_RESULT_REF_BYTES) revert RefTooLong(bytes(resultRef).length, MAX_RESULT_REF_BYTES);
        uint64 deadline = uint64(block.timestamp) + (j.proofKind == 0 ? j.challengeSecs : j.proveSecs);
        j.state = JobState.Delivered;
        j.deadline = deadline;
        j.outputCommitment = outputCommitment;
        if (trace != 0) {
            j.trace = trace;
            j.tracedAt = uint64(block.number);
        }
        j.inTokens = inTokens;
        j.outTokens = outTokens;
        emit ResultSubmitted(jobId, j.host, outputCommitment, trace, inTokens, outTokens, resultRef, j.attempts, deadline);
    }

    /// @notice Proves a delivered result with the verifier that the job copied when it was posted. Called by the host before its
    /// deadline. From Delivered the job becomes Proven and the client's time to object starts; a Challenged job stays so, and the
    /// proof decides it if no ruling comes.
    /// @param publicInputs Starts with `statementOf(jobId)`; the rest is the verifier's business.
    function submitProof(uint256 jobId, bytes calldata publicInputs, bytes calldata proof) external {
        Job storage j = _jobs[jobId];
        if (j.state != JobState.Delivered && j.state != JobState.Challenged) revert JobWrongState(jobId, j.state);
        _onlyHost(j);
        _notOverdue(j);
        if (j.proofKind == 0) revert NoProofWanted(jobId);
        if (j.proven) revert AlreadyProven(jobId);
        bytes32 expected = statementOf(jobId);
        bytes32 stated = publicInputs.length < 32 ? bytes32(0) : bytes32(publicInputs[:32]);
        if (stated != expected) revert WrongStatement(stated, expected);
        if (!IVerifier(j.verifier).verify(j.programId, publicInputs, proof)) revert ProofRejected(jobId, j.verifier);
        j.proven = true;
        if (j.state == JobState.Delivered) {
            j.state = JobState.Proven;
            j.deadline = uint64(block.timestamp) + j.challengeSecs;
        }
        emit ProofAccepted(jobId, j.proofKind, j.programId, keccak256(proof), j.deadline);
    }

    /// @notice Accepts the result as it is; the host is paid and its bond is free. Called by the client of a Delivered or Proven job.
    function acceptResult(uint256 jobId) external {
        Job storage j = _jobs[jobId];
        if (j.state != JobState.Delivered && j.state != JobState.Proven) revert JobWrongState(jobId, j.state);
        _onlyClient(j);
        _settle(jobId, j, Why.Accepted);
    }

    /// @notice Objects to a result. Called by the client of a Delivered or Proven job before its deadline, with the challenge bond as
    /// `msg.value`; only if the terms name an arbiter. The arbiter has `resolveSecs`, and where a proof is owed at least what is left of
    /// the time for it.
    /// @param reason The client's code, for the arbiter.
    /// @param evidenceHash Fixes what the client will show the arbiter.
    function challenge(uint256 jobId, uint8 reason, bytes32 evidenceHash) external payable {
        Job storage j = _jobs[jobId];
        if (j.state != JobState.Delivered && j.state != JobState.Proven) revert JobWrongState(jobId, j.state);
        _onlyClient(j);
        _notOverdue(j);
        if (j.arbiter == address(0)) revert NoArbiter(jobId);
        if (msg.value != j.challengeBond) revert WrongValue(msg.value, j.challengeBond);
        uint64 resolveBy = uint64(block.timestamp) + j.resolveSecs;
        bool owesProof = j.proofKind != 0 && !j.proven;
        j.state = JobState.Challenged;
        // An objection takes nothing from the time that the host was given to prove.
        if (!owesProof || resolveBy > j.deadline) j.deadline = resolveBy;
        emit Challenged(jobId, msg.sender, reason, evidenceHash, j.deadline);
    }

    /// @notice Carries out the arbiter's ruling. Called by anyone before the deadline. An arbiter that fails or rules nonsense makes this
    /// call fail; `expire` then ends the job.
    function resolve(uint256 jobId) external {
        Job storage j = _inState(jobId, JobState.Challenged);
        _notOverdue(j);
        (bool hostWins, uint16 slashBps) = IArbiter(j.arbiter).rule(jobId);
        if (slashBps > MAX_BPS) revert BadRuling(slashBps, MAX_BPS);
        _endChallenge(jobId, j, hostWins, slashBps, Why.Ruled);
    }

    /// @notice Ends a state whose deadline is over. Called by anyone.
    /// Open: refunded. Claimed: the whole bond goes to the client, the node is excluded, the job is Open again or refunded.
    /// Delivered without the proof it owes: the whole bond and the amount go to the client. Otherwise Delivered, and Proven: the host is
    /// paid. Challenged: a proven host is paid and gets the challenge bond. A host that owed a proof and gave none loses amount and
    /// bond; if no proof was owed, the arbiter's silence refunds the client and nobody loses a bond.
    function expire(uint256 jobId) external {
        Job storage j = _jobs[jobId];
        JobState state = j.state;
        if (state == JobState.None || state >= JobState.Settled) revert JobWrongState(jobId, state);
        if (block.timestamp <= j.deadline) revert DeadlineAhead(block.timestamp, j.deadline);
        if (state == JobState.Open) {
            _refund(jobId, j, Why.NotClaimed);
        } else if (state == JobState.Claimed) {
            _loseClaim(jobId, j, j.hostBond, Why.NotDelivered);
        } else if (state == JobState.Challenged) {
            bool fault = j.proven || j.proofKind != 0;
            _endChallenge(jobId, j, j.proven, fault ? MAX_BPS : 0, Why.NotRuled);
        } else if (state == JobState.Delivered && j.proofKind != 0) {
            _takeBond(jobId, j, j.hostBond);
            _refund(jobId, j, Why.NotProven);
        } else {
            _settle(jobId, j, Why.NotChallenged);
        }
    }

    /// @notice A job; all zero when there is none with this id.
    function jobs(uint256 jobId) external view returns (Job memory) {
        return _jobs[jobId];
    }

    /// @notice What a proof of this job must state: chain, escrow, job, client, node, model, input, output, trace and counts, in one word.
    /// @dev Shifted right by 8 bits, so that it is an element of every 254-bit scalar field. Since it names the node, a proof seen in
    /// the pool is of no use to another one.
    function statementOf(uint256 jobId) public view returns (bytes32) {
        Job storage j = _jobs[jobId];
        bytes32 full = keccak256(
            abi.encode(
                block.chainid,
                address(this),
                jobId,
                j.client,
                j.host,
                j.modelId,
                j.inputCommitment,
                j.outputCommitment,
                j.trace,
                j.inTokens,
                j.outTokens
            )
        );
        return full >> 8;
    }

    /// @notice What a result with these counts costs: rounded up to a whole unit, never above `maxAmount`.
    function priceOf(uint256 jobId, uint64 inTokens, uint64 outTokens) public view returns (uint128) {
        Job storage j = _jobs[jobId];
        // 64 + 128 bits and one carry: this cannot overflow 256.
        uint256 scaled = uint256(inTokens) * j.priceInPerMTok + uint256(outTokens) * j.priceOutPerMTok;
        uint256 amount = (scaled + 999_999) / 1_000_000;
        return amount > j.maxAmount ? j.maxAmount : uint128(amount);
    }

    function _checkTerms(JobTerms calldata t) private view returns (address verifier) {
        if (t.maxAmount == 0) revert ZeroAmount();
        if (t.claimBy < block.timestamp + MIN_DURATION_SECS || t.claimBy > block.timestamp + MAX_DURATION_SECS) {
            revert ClaimByOutOfBounds(t.claimBy, block.timestamp + MIN_DURATION_SECS, block.timestamp + MAX_DURATION_SECS);
        }
        _checkDuration("deliverSecs", t.deliverSecs);
        _checkDuration("challengeSecs", t.challengeSecs);
        if (t.maxAttempts == 0 || t.maxAttempts > MAX_ATTEMPTS) revert AttemptsOutOfBounds(t.maxAttempts, MAX_ATTEMPTS);
        if (t.arbiter != address(0)) _checkDuration("resolveSecs", t.resolveSecs);
        if (t.proofKind != 0) {
            _checkDuration("proveSecs", t.proveSecs);
            verifier = proofs.verifierOf(t.proofKind, t.programId);
            if (verifier == address(0)) revert UnknownVerifier(t.proofKind, t.programId);
        }
    }

    /// @dev The casts to 32 bits lose nothing: durations that apply are at most 30 days, and the others are not read, so they are
    /// stored as zero.
    function _store(Job storage j, JobTerms calldata t, address verifier, bytes32 inputCommitment) private {
        j.client = msg.sender;
        j.deadline = t.claimBy;
        j.state = JobState.Open;
        j.maxAttempts = t.maxAttempts;
        j.proofKind = t.proofKind;
        j.token = t.token;
        j.claimBy = t.claimBy;
        j.deliverSecs = uint32(t.deliverSecs);
        j.arbiter = t.arbiter;
        j.proveSecs = t.proofKind == 0 ? 0 : uint32(t.proveSecs);
        j.challengeSecs = uint32(t.challengeSecs);
        j.resolveSecs = t.arbiter == address(0) ? 0 : uint32(t.resolveSecs);
        j.verifier = verifier;
        j.maxAmount = t.maxAmount;
        j.hostBond = t.hostBond;
        j.priceInPerMTok = t.priceInPerMTok;
        j.priceOutPerMTok = t.priceOutPerMTok;
        j.maxInTokens = t.maxInTokens;
        j.maxOutTokens = t.maxOutTokens;
        j.challengeBond = t.challengeBond;
        j.modelId = t.modelId;
        j.programId = t.programId;
        j.inputCommitment = inputCommitment;
    }

    function _inState(uint256 jobId, JobState wanted) private view returns (Job storage j) {
        j = _jobs[jobId];
        if (j.state != wanted) revert JobWrongState(jobId, j.state);
    }

    function _onlyClient(Job storage j) private view {
        if (msg.sender != j.client) revert NotJobClient(msg.sender, j.client);
    }

    function _onlyHost(Job storage j) private view {
        if (nodes.nodeOf(msg.sender) != j.host) revert NotJobHost(msg.sender, j.host);
    }

    function _notOverdue(Job storage j) private view {
        if (block.timestamp > j.deadline) revert DeadlinePassed(block.timestamp, j.deadline);
    }

    /// @dev Frees the host's bond less `slashed` wei, which become the client's credit.
    function _takeBond(uint256 jobId, Job storage j, uint128 slashed) private {
        uint128 bond = j.hostBond;
        if (bond == 0) return;
        if (slashed == 0) {
            nodes.unlockBond(j.host, bond);
            return;
        }
        _credit(address(0), j.client, slashed);
        nodes.slash(j.host, bond, slashed, jobId);
    }

    function _loseClaim(uint256 jobId, Job storage j, uint128 slashed, Why why) private {
        address host = j.host;
        excluded[jobId][host] = true;
        bool reopen = j.attempts < j.maxAttempts && block.timestamp <= j.claimBy;
        emit ClaimLost(jobId, host, j.attempts, slashed, uint8(why), reopen);
        _takeBond(jobId, j, slashed);
        if (reopen) {
            j.state = JobState.Open;
            j.deadline = j.claimBy;
            j.host = address(0);
        } else {
            _refund(jobId, j, why);
        }
    }

    function _endChallenge(uint256 jobId, Job storage j, bool hostWins, uint16 slashBps, Why why) private {
        uint128 atStake = hostWins ? j.challengeBond : j.hostBond;
        uint128 slashed = uint128(uint256(atStake) * slashBps / MAX_BPS);
        emit ChallengeEnded(jobId, hostWins, slashed, uint8(why));
        if (hostWins) {
            _credit(address(0), nodes.payoutOf(j.host), slashed);
            _credit(address(0), j.client, j.challengeBond - slashed);
            _settle(jobId, j, why);
        } else {
            _credit(address(0), j.client, j.challengeBond);
            _takeBond(jobId, j, slashed);
            _refund(jobId, j, why);
        }
    }

    function _settle(uint256 jobId, Job storage j, Why why) private {
        j.state = JobState.Settled;
        uint128 toHost = priceOf(jobId, j.inTokens, j.outTokens);
        uint128 toClient = j.maxAmount - toHost;
        address payout = nodes.payoutOf(j.host);
        _credit(j.token, payout, toHost);
        _credit(j.token, j.client, toClient);
        _takeBond(jobId, j, 0);
        emit JobSettled(jobId, j.host, payout, toHost, toClient, j.attempts, uint8(why));
    }

    function _refund(uint256 jobId, Job storage j, Why why) private {
        j.state = JobState.Refunded;
        _credit(j.token, j.client, j.maxAmount);
        emit JobRefunded(jobId, j.client, j.maxAmount, j.attempts, uint8(why));
    }
}

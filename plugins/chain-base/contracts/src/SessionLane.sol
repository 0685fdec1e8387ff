// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {SignatureChecker} from "@openzeppelin/contracts/utils/cryptography/SignatureChecker.sol";
import {Ledger} from "./Ledger.sol";

/// @title Sessions paid by vouchers
/// @notice A client puts a deposit behind an offer that the host signed, then signs vouchers for a growing total as tokens arrive.
/// Only the best voucher matters. States: Active, Closing (the client asked to close; the host may still bring a voucher), Settled.
/// @dev Prices are in the offer and in the log. The contract does not compute amounts from them: the client's signature is the amount.
/// A client that is a contract (ERC-1271) can withdraw its approval of a signature, so a host should settle such vouchers early and
/// should not put them in one batch with others. What a key signed stays good, whatever code its account is given later (EIP-7702).
abstract contract SessionLane is Ledger, EIP712 {
    uint256 public constant MAX_BATCH = 64;

    bytes32 public constant VOUCHER_TYPEHASH = keccak256(
        "Voucher(bytes32 sessionId,address host,uint128 cumulativeAmount,uint64 cumulativeIn,uint64 cumulativeOut,bytes32 transcriptRoot)"
    );
    bytes32 public constant OFFER_TYPEHASH = keccak256(
        "Offer(address host,address client,bytes32 modelId,address token,uint128 priceInPerMTok,uint128 priceOutPerMTok,uint64 expiry,uint64 settleWindowSecs,uint64 offerValidUntil,bytes32 nonce)"
    );

    enum SessionState {
        None,
        Active,
        Closing,
        Settled
    }

    /// @param host The node's id.
    /// @param deposit Units of `token` the client puts in; its own choice, not part of the offer.
    /// @param priceInPerMTok Units of `token` per million prompt tokens.
    /// @param priceOutPerMTok Units of `token` per million generated tokens.
    /// @param expiry Unix second after which no work is expected, at most 30 days ahead.
    /// @param settleWindowSecs How long the host may still settle after a close by the client, or after the expiry.
    /// @param offerValidUntil Last second at which the offer may be taken.
    /// @param nonce Unique between these two parties.
    struct SessionTerms {
        address host;
        address client;
        bytes32 modelId;
        address token;
        uint128 deposit;
        uint128 priceInPerMTok;
        uint128 priceOutPerMTok;
        uint64 expiry;
        uint64 settleWindowSecs;
        uint64 offerValidUntil;
        bytes32 nonce;
    }

    /// @param cumulativeAmount Total the client owes in this session so far.
    /// @param cumulativeIn Prompt tokens so far.
    /// @param cumulativeOut Generated tokens so far.
    /// @param transcriptRoot Commitment to what was exchanged, for whoever wants to prove something about it later.
    struct Voucher {
        bytes32 sessionId;
        address host;
        uint128 cumulativeAmount;
        uint64 cumulativeIn;
        uint64 cumulativeOut;
        bytes32 transcriptRoot;
    }

    /// @param settleBy Last second at which a voucher counts; afterwards anyone may finalize.
    /// @param paid Credited to the host so far; never more than `deposit`.
    struct Session {
        address client;
        uint64 expiry;
        SessionState state;
        address host;
        uint64 settleBy;
        address token;
        uint64 settleWindowSecs;
        uint128 deposit;
        uint128 paid;
    }

    mapping(bytes32 sessionId => Session) private _sessions;

    event SessionOpened(
        bytes32 indexed sessionId, address indexed client, address indexed host, SessionTerms terms, uint64 settleBy
    );
    event SessionToppedUp(bytes32 indexed sessionId, uint128 added, uint128 total);
    event VoucherSettled(
        bytes32 indexed sessionId,
        address indexed host,
        address payout,
        uint128 cumulativeAmount,
        uint128 paidNow,
        uint64 cumulativeIn,
        uint64 cumulativeOut,
        bytes32 transcriptRoot
    );
    /// @notice A voucher of a batch was left out; `why` is a `SkipReason`.
    event VoucherSkipped(bytes32 indexed sessionId, uint256 index, uint8 why);
    event SessionClosing(bytes32 indexed sessionId, uint64 settleBy);
    event SessionSettled(bytes32 indexed sessionId, uint128 toHost, uint128 toClient, uint8 why);

    /// @notice Why a voucher cannot settle.
    enum SkipReason {
        None,
        NotOpen,
        TooLate,
        WrongHost,
        NotImproving,
        AboveDeposit,
        BadSignature
    }

    /// @notice Why a session ended.
    enum SessionEnd {
        None,
        HostClosed,
        SettleWindowPassed
    }

    error NotClient(address caller, address client);
    error NotHost(address caller, address host);
    error NotClientNorHost(address caller);
    error ZeroDeposit();
    error OfferExpired(uint256 now_, uint256 offerValidUntil);
    error ExpiryOutOfBounds(uint256 expiry, uint256 min, uint256 max);
    error BadOfferSignature(address hotKey);
    error SessionExists(bytes32 sessionId);
    error SessionWrongState(bytes32 sessionId, SessionState state);
    error SettleWindowOver(uint256 now_, uint256 settleBy);
    error SettleWindowOpen(uint256 now_, uint256 settleBy);
    error SessionExpired(uint256 now_, uint256 expiry);
    error DepositTooLarge(uint256 total);
    error VoucherWrongHost(address inVoucher, address host);
    error VoucherNotImproving(uint256 cumulativeAmount, uint256 paid);
    error VoucherAboveDeposit(uint256 cumulativeAmount, uint256 deposit);
    error BadVoucherSignature(address client);
    error BatchSize(uint256 vouchers, uint256 signatures, uint256 max);

    /// @notice Opens a session on a host's signed offer. Called by the client named in it, with the deposit (native coin as `msg.value`,
    /// a token by allowance). Afterwards the session is Active until it is closed, or until its expiry and settle window are over.
    /// Fails when paused, when the host's node may not take on work, and when the nonce was used.
    /// @param hostOfferSig The signature of the node's current hot key on `offerDigest(t)`, by key or by ERC-1271.
    function openSession(SessionTerms calldata t, bytes calldata hostOfferSig)
        external
        payable
        nonReentrant
        whenNotPaused
        returns (bytes32 sessionId)
    {
        if (msg.sender != t.client) revert NotClient(msg.sender, t.client);
        if (t.deposit == 0) revert ZeroDeposit();
        if (block.timestamp > t.offerValidUntil) revert OfferExpired(block.timestamp, t.offerValidUntil);
        if (t.expiry < block.timestamp + MIN_DURATION_SECS || t.expiry > block.timestamp + MAX_DURATION_SECS) {
            revert ExpiryOutOfBounds(t.expiry, block.timestamp + MIN_DURATION_SECS, block.timestamp + MAX_DURATION_SECS);
        }
        _checkDuration("settleWindowSecs", t.settleWindowSecs);
        sessionId = keccak256(abi.encode(block.chainid, address(this), t.client, t.host, t.nonce));
        if (_sessions[sessionId].state != SessionState.None) revert SessionExists(sessionId);
        address hotKey = nodes.activeHotKey(t.host);
        if (!_signedBy(hotKey, offerDigest(t), hostOfferSig)) revert BadOfferSignature(hotKey);

        _pull(t.token, t.deposit);
        uint64 settleBy = t.expiry + t.settleWindowSecs;
        _sessions[sessionId] = Session({
            client: t.client,
            expiry: t.expiry,
            state: SessionState.Active,
            host: t.host,
            settleBy: settleBy,
            token: t.token,
            settleWindowSecs: t.settleWindowSecs,
            deposit: t.deposit,
            paid: 0
        });
        emit SessionOpened(sessionId, t.client, t.host, t, settleBy);
    }

    /// @notice Adds to the deposit of an Active session that has not expired. Called by its client.
    function topUp(bytes32 sessionId, uint128 amount) external payable nonReentrant {
        Session storage s = _sessions[sessionId];
        if (s.state != SessionState.Active) revert SessionWrongState(sessionId, s.state);
        if (msg.sender != s.client) revert NotClient(msg.sender, s.client);
        if (block.timestamp > s.expiry) revert SessionExpired(block.timestamp, s.expiry);
        if (amount == 0) revert ZeroDeposit();
        uint256 total = uint256(s.deposit) + amount;
        if (total > type(uint128).max) revert DepositTooLarge(total);
        _pull(s.token, amount);
        s.deposit = uint128(total);
        emit SessionToppedUp(sessionId, amount, uint128(total));
    }

    /// @notice Credits the host with what the voucher adds to earlier ones. Called by anyone who holds it, while the session is Active
    /// or Closing and its settle window is open. Fails when it adds nothing or exceeds the deposit.
    /// @param clientSig The client's signature on `voucherDigest(v)`, by key or by ERC-1271.
    function settle(Voucher calldata v, bytes calldata clientSig) external {
        Session storage s = _sessions[v.sessionId];
        _requireNoReason(_whyNot(s, v, clientSig, false), s, v);
        _pay(s, v);
    }

    /// @notice Settles up to 64 vouchers, of any sessions. One that cannot settle is left out with a `VoucherSkipped`, so that a single
    /// stale or dishonest one costs the others nothing.
    /// @return settled How many were credited.
    function settleMany(Voucher[] calldata v, bytes[] calldata sigs) external returns (uint256 settled) {
        if (v.length == 0 || v.length > MAX_BATCH || v.length != sigs.length) revert BatchSize(v.length, sigs.length, MAX_BATCH);
        for (uint256 i = 0; i < v.length; ++i) {
            Session storage s = _sessions[v[i].sessionId];
            SkipReason why = _whyNot(s, v[i], sigs[i], false);
            if (why != SkipReason.None) {
                emit VoucherSkipped(v[i].sessionId, i, uint8(why));
                continue;
            }
            _pay(s, v[i]);
            ++settled;
        }
    }

    /// @notice Credits the host with its last voucher and the client with the rest, in one transaction. Called by the host's hot key
    /// while a voucher still counts. A voucher equal to what was paid already is fine: then this only closes.
    function settleAndClose(Voucher calldata v, bytes calldata clientSig) external {
        Session storage s = _sessions[v.sessionId];
        _requireNoReason(_whyNot(s, v, clientSig, true), s, v);
        if (nodes.nodeOf(msg.sender) != s.host) revert NotHost(msg.sender, s.host);
        if (v.cumulativeAmount > s.paid) _pay(s, v);
        _end(v.sessionId, s, SessionEnd.HostClosed);
    }

    /// @notice Ends a session. By the host's hot key: at once, and the unpaid rest is the client's. By the client of an Active session:
    /// it becomes Closing, and the host has its settle window for a last voucher.
    function closeSession(bytes32 sessionId) external {
        Session storage s = _sessions[sessionId];
        if (s.state != SessionState.Active && s.state != SessionState.Closing) revert SessionWrongState(sessionId, s.state);
        if (msg.sender != s.client) {
            if (nodes.nodeOf(msg.sender) != s.host) revert NotClientNorHost(msg.sender);
            _end(sessionId, s, SessionEnd.HostClosed);
            return;
        }
        if (s.state == SessionState.Closing) revert SessionWrongState(sessionId, s.state);
        if (block.timestamp > s.settleBy) revert SettleWindowOver(block.timestamp, s.settleBy);
        // Closing never lengthens the session: after the expiry the window is already running.
        uint64 settleBy = uint64(block.timestamp) + s.settleWindowSecs;
        if (settleBy > s.settleBy) settleBy = s.settleBy;
        s.state = SessionState.Closing;
        s.settleBy = settleBy;
        emit SessionClosing(sessionId, settleBy);
    }

    /// @notice Credits the client with the unpaid rest, once no voucher counts any more. Called by anyone.
    function finalizeSession(bytes32 sessionId) external {
        Session storage s = _sessions[sessionId];
        if (s.state != SessionState.Active && s.state != SessionState.Closing) revert SessionWrongState(sessionId, s.state);
        if (block.timestamp <= s.settleBy) revert SettleWindowOpen(block.timestamp, s.settleBy);
        _end(sessionId, s, SessionEnd.SettleWindowPassed);
    }

    /// @notice A session; all zero when it was never opened.
    function sessions(bytes32 sessionId) external view returns (Session memory) {
        return _sessions[sessionId];
    }

    /// @notice The EIP-712 domain separator of (name "fabstir", version "1", this chain, this contract).
    function domainSeparator() external view returns (bytes32) {
        return _domainSeparatorV4();
    }

    /// @notice What a client signs to pay.
    function voucherDigest(Voucher calldata v) public view returns (bytes32) {
        return _hashTypedDataV4(
            keccak256(
                abi.encode(
                    VOUCHER_TYPEHASH, v.sessionId, v.host, v.cumulativeAmount, v.cumulativeIn, v.cumulativeOut, v.transcriptRoot
                )
            )
        );
    }

    /// @notice What a host's hot key signs to offer; the deposit is not part of it.
    function offerDigest(SessionTerms calldata t) public view returns (bytes32) {
        return _hashTypedDataV4(
            keccak256(
                abi.encode(
                    OFFER_TYPEHASH,
                    t.host,
                    t.client,
                    t.modelId,
                    t.token,
                    t.priceInPerMTok,
                    t.priceOutPerMTok,
                    t.expiry,
                    t.settleWindowSecs,
                    t.offerValidUntil,
                    t.nonce
                )
            )
        );
    }

    /// @dev The one rule for vouchers. The signature comes last: it costs most.
    function _whyNot(Session storage s, Voucher calldata v, bytes calldata sig, bool equalIsFine) private view returns (SkipReason) {
        SessionState state = s.state;
        if (state != SessionState.Active && state != SessionState.Closing) return SkipReason.NotOpen;
        if (block.timestamp > s.settleBy) return SkipReason.TooLate;
        if (v.host != s.host) return SkipReason.WrongHost;
        if (equalIsFine ? v.cumulativeAmount < s.paid : v.cumulativeAmount <= s.paid) return SkipReason.NotImproving;
        if (v.cumulativeAmount > s.deposit) return SkipReason.AboveDeposit;
        if (!_signedBy(s.client, voucherDigest(v), sig)) return SkipReason.BadSignature;
        return SkipReason.None;
    }

    /// @dev The one rule for signatures: by the signer's key, else by ERC-1271. The key comes first, because an account that has a key
    /// can be given any code after it has signed (EIP-7702), and that code must not undo what the key signed.
    function _signedBy(address signer, bytes32 digest, bytes calldata sig) private view returns (bool) {
        (address recovered, ECDSA.RecoverError err,) = ECDSA.tryRecoverCalldata(digest, sig);
        if (err == ECDSA.RecoverError.NoError && recovered == signer) return true;
        return SignatureChecker.isValidERC1271SignatureNowCalldata(signer, digest, sig);
    }

    function _requireNoReason(SkipReason why, Session storage s, Voucher calldata v) private view {
        if (why == SkipReason.None) return;
        if (why == SkipReason.NotOpen) revert SessionWrongState(v.sessionId, s.state);
        if (why == SkipReason.TooLate) revert SettleWindowOver(block.timestamp, s.settleBy);
        if (why == SkipReason.WrongHost) revert VoucherWrongHost(v.host, s.host);
        if (why == SkipReason.NotImproving) revert VoucherNotImproving(v.cumulativeAmount, s.paid);
        if (why == SkipReason.AboveDeposit) revert VoucherAboveDeposit(v.cumulativeAmount, s.deposit);
        revert BadVoucherSignature(s.client);
    }

    function _pay(Session storage s, Voucher calldata v) private {
        uint128 paidNow = v.cumulativeAmount - s.paid;
        s.paid = v.cumulativeAmount;
        address payout = nodes.payoutOf(s.host);
        _credit(s.token, payout, paidNow);
        emit VoucherSettled(
            v.sessionId, v.host, payout, v.cumulativeAmount, paidNow, v.cumulativeIn, v.cumulativeOut, v.transcriptRoot
        );
    }

    function _end(bytes32 sessionId, Session storage s, SessionEnd why) private {
        s.state = SessionState.Settled;
        uint128 rest = s.deposit - s.paid;
        _credit(s.token, s.client, rest);
        emit SessionSettled(sessionId, s.paid, rest, uint8(why));
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Address} from "@openzeppelin/contracts/utils/Address.sol";
import {INodeRegistry} from "./interfaces/INodeRegistry.sol";

/// @title Who serves, where, and with what at stake
/// @notice A node is named for ever by the address that registered it. Two keys act for it: the hot key, which lives on the
/// serving machine and does the daily work, and the payout address, which owns the stake and the earnings. A stolen hot key can
/// disturb the service; it cannot move stake or redirect payments. There is no administrator.
/// @dev Peer id and addresses are in the logs; storage keeps only their hashes, since no contract reads them.
contract NodeRegistry is INodeRegistry {
    uint256 public constant MAX_PEER_ID_BYTES = 64;
    uint256 public constant MAX_MULTIADDRS = 8;
    uint256 public constant MAX_MULTIADDR_BYTES = 256;

    /// @notice The only address that may lock, unlock and slash bonds.
    address public immutable escrow;
    /// @notice Wei a node must hold to register, and to claim jobs or open sessions later.
    uint128 public immutable minStake;
    /// @notice Seconds between `beginExit` and the earliest `finishExit`.
    uint64 public immutable exitDelaySecs;

    mapping(address node => Node) private _nodes;
    mapping(address hotKey => address node) private _nodeOf;
    /// @notice Wei of finished exits that `who` may withdraw.
    mapping(address who => uint256) public credits;

    event NodeRegistered(
        address indexed node, address indexed payout, bytes peerId, bytes32 recordHash, string[] multiaddrs, uint128 stake
    );
    event NodeUpdated(address indexed node, bytes peerId, bytes32 recordHash, string[] multiaddrs);
    event HotKeySet(address indexed node, address indexed oldHotKey, address indexed newHotKey);
    event PayoutSet(address indexed node, address indexed oldPayout, address indexed newPayout);
    /// @notice Emitted after each change of stake or of the locked part of it; both are totals.
    event StakeChanged(address indexed node, uint128 stake, uint128 locked);
    event ExitStarted(address indexed node, uint64 exitAt);
    event Exited(address indexed node, address indexed payout, uint128 amount);
    event Slashed(address indexed node, uint256 indexed jobId, uint128 amount);
    event Withdrawn(address indexed who, uint256 amount, address to);

    error ZeroAddress();
    error AlreadyRegistered(address node);
    error UnknownNode(address node);
    error HotKeyInUse(address hotKey, address node);
    error PayoutIsHotKey(address key);
    error NotPayout(address caller, address payout);
    error NotHotKeyNorPayout(address caller);
    error NotEscrow(address caller);
    error StakeTooSmall(uint256 stake, uint256 minStake);
    error StakeTooLarge(uint256 stake);
    error BondExceedsFreeStake(uint256 bond, uint256 free);
    error NodeNotActive(address node, NodeState state);
    error ExitNotStarted(address node, NodeState state);
    error ExitTooEarly(uint256 now_, uint256 exitAt);
    error BondsStillLocked(uint256 locked);
    error PeerIdLength(uint256 bytes_, uint256 max);
    error TooManyMultiaddrs(uint256 count, uint256 max);
    error MultiaddrTooLong(uint256 index, uint256 bytes_, uint256 max);
    error NothingToWithdraw(address who);

    modifier onlyEscrow() {
        if (msg.sender != escrow) revert NotEscrow(msg.sender);
        _;
    }

    /// @param escrow_ The escrow; it need not exist yet (its address is predicted when deploying).
    /// @param minStake_ See `minStake`.
    /// @param exitDelaySecs_ See `exitDelaySecs`.
    constructor(address escrow_, uint128 minStake_, uint64 exitDelaySecs_) {
        if (escrow_ == address(0)) revert ZeroAddress();
        escrow = escrow_;
        minStake = minStake_;
        exitDelaySecs = exitDelaySecs_;
    }

    /// @notice Registers the caller as a node. Called once, by the key that will serve; `msg.value` is the stake.
    /// Afterwards the caller's address is the node's permanent id and its first hot key.
    /// @dev If another node had named the caller as its hot key, that node loses it: only the holder of a key can register it,
    /// so nobody can keep a key out of the registry by naming it first.
    /// @param payout The address that owns stake and earnings; it must differ from the caller.
    /// @param peerId The libp2p peer id in bytes, 1 to 64.
    /// @param recordHash Hash of the signed record that peers serve; zero if there is none.
    /// @param multiaddrs Where to dial, at most 8 of at most 256 bytes each.
    function register(address payout, bytes calldata peerId, bytes32 recordHash, string[] calldata multiaddrs) external payable {
        if (payout == address(0)) revert ZeroAddress();
        if (payout == msg.sender) revert PayoutIsHotKey(payout);
        if (_nodes[msg.sender].state != NodeState.None) revert AlreadyRegistered(msg.sender);
        if (msg.value < minStake) revert StakeTooSmall(msg.value, minStake);
        if (msg.value > type(uint128).max) revert StakeTooLarge(msg.value);
        _checkRecord(peerId, multiaddrs);

        address other = _nodeOf[msg.sender];
        if (other != address(0)) {
            _nodes[other].hotKey = address(0);
            emit HotKeySet(other, msg.sender, address(0));
        }
        _nodeOf[msg.sender] = msg.sender;
        _nodes[msg.sender] = Node({
            hotKey: msg.sender,
            exitAt: 0,
            state: NodeState.Active,
            payout: payout,
            stake: uint128(msg.value),
            locked: 0,
            recordHash: recordHash,
            peerIdHash: keccak256(peerId)
        });
        emit NodeRegistered(msg.sender, payout, peerId, recordHash, multiaddrs, uint128(msg.value));
    }

    /// @notice Replaces peer id, record and addresses. Called by the current hot key of a node that is not exiting.
    function update(bytes calldata peerId, bytes32 recordHash, string[] calldata multiaddrs) external {
        address id = _nodeOf[msg.sender];
        Node storage n = _active(id);
        _checkRecord(peerId, multiaddrs);
        n.recordHash = recordHash;
        n.peerIdHash = keccak256(peerId);
        emit NodeUpdated(id, peerId, recordHash, multiaddrs);
    }

    /// @notice Gives a node another hot key; the old one is powerless from then on. Called by the payout address.
    /// @param newHot A key that serves no node, is not the payout address and is not the id of another node.
    function setHotKey(address id, address newHot) external {
        Node storage n = _ownedByCaller(id);
        if (newHot == address(0)) revert ZeroAddress();
        if (newHot == n.payout) revert PayoutIsHotKey(newHot);
        if (_nodeOf[newHot] != address(0)) revert HotKeyInUse(newHot, _nodeOf[newHot]);
        if (newHot != id && _nodes[newHot].state != NodeState.None) revert HotKeyInUse(newHot, newHot);
        address old = n.hotKey;
        delete _nodeOf[old];
        _nodeOf[newHot] = id;
        n.hotKey = newHot;
        emit HotKeySet(id, old, newHot);
    }

    /// @notice Hands stake and future earnings to another address. Called by the payout address. Amounts already credited stay
    /// with the address they were credited to.
    function setPayout(address id, address newPayout) external {
        Node storage n = _ownedByCaller(id);
        if (newPayout == address(0)) revert ZeroAddress();
        if (newPayout == n.hotKey) revert PayoutIsHotKey(newPayout);
        emit PayoutSet(id, n.payout, newPayout);
        n.payout = newPayout;
    }

    /// @notice Adds `msg.value` to the stake of a node that is not exiting. Called by anyone; the stake belongs to the payout address.
    function addStake(address id) external payable {
        Node storage n = _active(id);
        uint256 total = uint256(n.stake) + msg.value;
        if (total > type(uint128).max) revert StakeTooLarge(total);
        n.stake = uint128(total);
        emit StakeChanged(id, n.stake, n.locked);
    }

    /// @notice Starts the exit: from now on the node claims no job and opens no session. Called by the hot key or the payout address.
    /// Work in hand goes on and is paid. It cannot be undone; a new node needs a new key.
    function beginExit(address id) external {
        Node storage n = _active(id);
        if (msg.sender != n.hotKey && msg.sender != n.payout) revert NotHotKeyNorPayout(msg.sender);
        n.state = NodeState.Exiting;
        n.exitAt = uint64(block.timestamp) + exitDelaySecs;
        emit ExitStarted(id, n.exitAt);
    }

    /// @notice Ends an exit: the stake becomes a credit of the payout address. Called by anyone, once the delay is over and no bond is locked.
    function finishExit(address id) external {
        Node storage n = _nodes[id];
        if (n.state != NodeState.Exiting) revert ExitNotStarted(id, n.state);
        if (block.timestamp < n.exitAt) revert ExitTooEarly(block.timestamp, n.exitAt);
        if (n.locked != 0) revert BondsStillLocked(n.locked);
        uint128 amount = n.stake;
        n.stake = 0;
        n.state = NodeState.Exited;
        credits[n.payout] += amount;
        emit Exited(id, n.payout, amount);
    }

    /// @notice Sends the caller's whole credit to `to`. A `to` that refuses the coin makes this call fail and nothing else.
    function withdraw(address payable to) external {
        if (to == address(0)) revert ZeroAddress();
        uint256 amount = credits[msg.sender];
        if (amount == 0) revert NothingToWithdraw(msg.sender);
        credits[msg.sender] = 0;
        emit Withdrawn(msg.sender, amount, to);
        Address.sendValue(to, amount);
    }

    /// @inheritdoc INodeRegistry
    function lockBond(address id, uint128 bond) external onlyEscrow {
        Node storage n = _active(id);
        if (n.stake < minStake) revert StakeTooSmall(n.stake, minStake);
        uint128 free = n.stake - n.locked;
        if (bond > free) revert BondExceedsFreeStake(bond, free);
        if (bond == 0) return;
        n.locked += bond;
        emit StakeChanged(id, n.stake, n.locked);
    }

    /// @inheritdoc INodeRegistry
    function unlockBond(address id, uint128 bond) external onlyEscrow {
        Node storage n = _nodes[id];
        n.locked -= bond;
        emit StakeChanged(id, n.stake, n.locked);
    }

    /// @inheritdoc INodeRegistry
    function slash(address id, uint128 bond, uint128 amount, uint256 jobId) external onlyEscrow {
        Node storage n = _nodes[id];
        if (amount > bond) revert BondExceedsFreeStake(amount, bond);
        n.locked -= bond;
        n.stake -= amount;
        emit Slashed(id, jobId, amount);
        emit StakeChanged(id, n.stake, n.locked);
        // The escrow is the caller, is immutable, and accepts coin from this contract without running other code.
        Address.sendValue(payable(escrow), amount);
    }

    /// @inheritdoc INodeRegistry
    function nodeOf(address hotKey) external view returns (address) {
        return _nodeOf[hotKey];
    }

    /// @notice Everything stored about a node; all zero when the id was never registered.
    function node(address id) external view returns (Node memory) {
        return _nodes[id];
    }

    /// @inheritdoc INodeRegistry
    function payoutOf(address id) external view returns (address) {
        return _nodes[id].payout;
    }

    /// @inheritdoc INodeRegistry
    function activeHotKey(address id) external view returns (address) {
        Node storage n = _active(id);
        if (n.stake < minStake) revert StakeTooSmall(n.stake, minStake);
        return n.hotKey;
    }

    function _active(address id) private view returns (Node storage n) {
        n = _nodes[id];
        if (n.state == NodeState.None) revert UnknownNode(id);
        if (n.state != NodeState.Active) revert NodeNotActive(id, n.state);
    }

    function _ownedByCaller(address id) private view returns (Node storage n) {
        n = _nodes[id];
        if (n.state == NodeState.None) revert UnknownNode(id);
        if (msg.sender != n.payout) revert NotPayout(msg.sender, n.payout);
    }

    function _checkRecord(bytes calldata peerId, string[] calldata multiaddrs) private pure {
        if (peerId.length == 0 || peerId.length > MAX_PEER_ID_BYTES) revert PeerIdLength(peerId.length, MAX_PEER_ID_BYTES);
        if (multiaddrs.length > MAX_MULTIADDRS) revert TooManyMultiaddrs(multiaddrs.length, MAX_MULTIADDRS);
        for (uint256 i = 0; i < multiaddrs.length; ++i) {
            uint256 length = bytes(multiaddrs[i]).length;
            if (length > MAX_MULTIADDR_BYTES) revert MultiaddrTooLong(i, length, MAX_MULTIADDR_BYTES);
        }
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

/// @notice What the escrow needs of the registry of nodes.
interface INodeRegistry {
    enum NodeState {
        None,
        Active,
        Exiting,
        Exited
    }

    /// @param hotKey The key that acts for the node now; zero if its holder has registered it as a node of its own.
    /// @param exitAt Earliest second of `finishExit`; zero unless exiting or exited.
    /// @param payout Owner of stake and earnings.
    /// @param stake Wei at stake, locked bonds included.
    /// @param locked Wei of `stake` that secures claimed jobs.
    struct Node {
        address hotKey;
        uint64 exitAt;
        NodeState state;
        address payout;
        uint128 stake;
        uint128 locked;
        bytes32 recordHash;
        bytes32 peerIdHash;
    }

    /// @notice Sets `bond` wei of the node's free stake aside. Escrow only. Fails unless the node is active, holds the minimum stake
    /// and has that much free; a bond of zero still checks the first two.
    function lockBond(address node, uint128 bond) external;

    /// @notice Frees `bond` wei that were locked. Escrow only.
    function unlockBond(address node, uint128 bond) external;

    /// @notice Frees `bond` locked wei and takes `amount` of them (at most `bond`), which arrive at the escrow in this call. Escrow only.
    function slash(address node, uint128 bond, uint128 amount, uint256 jobId) external;

    /// @notice The node for which `hotKey` acts now, or zero.
    function nodeOf(address hotKey) external view returns (address);

    /// @notice Who is paid for the node's work now; kept after the exit, so that late sessions still pay.
    function payoutOf(address node) external view returns (address);

    /// @notice The hot key of a node that may take on work; fails if the node is unknown, exiting or below the minimum stake.
    function activeHotKey(address node) external view returns (address);
}

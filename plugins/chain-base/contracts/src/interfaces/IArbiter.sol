// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

/// @notice The voice that a job's terms name for disputes. It can only choose between the two outcomes.
interface IArbiter {
    /// @notice The ruling on a challenged job. Called statically by the escrow of the job. Fails while there is no ruling.
    /// @return hostWins True pays the host, false refunds the client.
    /// @return slashBps Share of the loser's bond that goes to the winner, in 1/10,000 (at most 10,000); the loser gets the rest back.
    function rule(uint256 jobId) external view returns (bool hostWins, uint16 slashBps);
}

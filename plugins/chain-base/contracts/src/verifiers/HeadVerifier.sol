// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {JobLane} from "../JobLane.sol";
import {IVerifier} from "../interfaces/IVerifier.sol";
import {Groth16Verifier} from "./Groth16Verifier.sol";

/// @title Checks that a model's output head chose tokens of a delivered job, at positions that nobody knew when it was delivered
/// @notice With its result a host hands in `trace`, the root of a tree over all of its tokens. The hash of the block after that draws the
/// positions, and for each the host proves that the head chooses the token for the state that the tree has there.
/// @dev The tree: a leaf is keccak256(0x00 || position || token || state), each a word; two neighbours make keccak256(0x01 || left ||
/// right); the last of an odd number goes up a level as it is. Draw number i is keccak256(block hash || subject || i) mod outTokens.
/// The caller is the escrow whose job it is: whoever else calls learns something about its own jobs alone.
contract HeadVerifier is IVerifier {
    /// @dev Where a chain keeps the hashes of its last 8,191 blocks (EIP-2935); the opcode knows 256.
    address private constant HISTORY = 0x0000F90827F1C53a10cb7A02335B175320002935;
    uint256 private constant OPCODE_REACH = 256;
    uint256 public constant MAX_SAMPLES = 8;

    /// @param position Counts from 0.
    /// @param state The commitment of the model's last state at this position.
    /// @param path The neighbour of each level, from the leaves up, where there is one.
    /// @param proof Of the public inputs subject, position, token, state.
    struct Opening {
        uint256 position;
        uint256 token;
        bytes32 state;
        bytes32[] path;
        bytes proof;
    }

    /// @notice How many positions are drawn; one may be drawn twice, and is then opened twice.
    uint256 public immutable samples;
    /// @notice Checks the proof of one position.
    Groth16Verifier public immutable head;
    /// @notice keccak256 of the head's own program and of `samples`, a word each: with another number of draws it is another program.
    bytes32 public immutable program;
    bytes32 private immutable _headProgram;

    error BadSamples(uint256 samples, uint256 max);
    error NoCodeAt(address head);

    constructor(uint256 samples_, Groth16Verifier head_) {
        if (samples_ == 0 || samples_ > MAX_SAMPLES) revert BadSamples(samples_, MAX_SAMPLES);
        if (address(head_).code.length == 0) revert NoCodeAt(address(head_));
        samples = samples_;
        head = head_;
        _headProgram = head_.program();
        program = keccak256(abi.encode(_headProgram, samples_));
    }

    /// @inheritdoc IVerifier
    /// @param publicInputs The job's statement and its id, a word each.
    /// @param proof `abi.encode(Opening[])`, in order of the draw.
    function verify(bytes32 programId, bytes calldata publicInputs, bytes calldata proof) external view returns (bool) {
        if (programId != program || publicInputs.length != 64) return false;
        (bytes32 subject, uint256 jobId) = abi.decode(publicInputs, (bytes32, uint256));
        JobLane.Job memory job = JobLane(payable(msg.sender)).jobs(jobId);
        if (job.trace == 0 || job.outTokens == 0) return false;
        if (JobLane(payable(msg.sender)).statementOf(jobId) != subject) return false;
        bytes32 seed = blockHash(uint256(job.tracedAt) + 1);
        if (seed == 0) return false;

        Opening[] memory openings = abi.decode(proof, (Opening[]));
        if (openings.length != samples) return false;
        for (uint256 i; i < openings.length; ++i) {
            uint256 drawn = uint256(keccak256(abi.encode(seed, subject, i))) % job.outTokens;
            if (openings[i].position != drawn || !_leads(openings[i], job.trace, job.outTokens)) return false;
            if (!_chosen(subject, openings[i])) return false;
        }
        return true;
    }

    function _chosen(bytes32 subject, Opening memory o) private view returns (bool) {
        return head.verify(_headProgram, abi.encode(subject, o.position, o.token, o.state), o.proof);
    }

    /// @notice The hash of a block that was, as far as the chain still knows it; otherwise zero.
    function blockHash(uint256 number) public view returns (bytes32) {
        if (number >= block.number) return 0;
        if (block.number - number <= OPCODE_REACH) return blockhash(number);
        (bool known, bytes memory answer) = HISTORY.staticcall(abi.encode(number));
        return known && answer.length == 32 ? abi.decode(answer, (bytes32)) : bytes32(0);
    }

    /// @dev Whether an opening is a leaf of the tree of `count` leaves.
    function _leads(Opening memory o, bytes32 root, uint256 count) private pure returns (bool) {
        bytes32 hash = keccak256(abi.encodePacked(uint8(0), o.position, o.token, o.state));
        uint256 place = o.position;
        uint256 used;
        for (; count > 1; count = (count + 1) / 2) {
            if ((place ^ 1) < count) {
                if (used == o.path.length) return false;
                bytes32 neighbour = o.path[used++];
                hash = place % 2 == 0
                    ? keccak256(abi.encodePacked(uint8(1), hash, neighbour))
                    : keccak256(abi.encodePacked(uint8(1), neighbour, hash));
            }
            place /= 2;
        }
        return used == o.path.length && hash == root;
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {IVerifier} from "../interfaces/IVerifier.sol";

/// @title Checks Groth16 proofs over BN254 under one verifying key
/// @notice Anyone may deploy it: what it checks is fixed by its arguments, and `program` says which keys those are.
contract Groth16Verifier is IVerifier {
    /// @dev The modulus of the points' coordinates, and that of the public inputs.
    uint256 private constant P = 21888242871839275222246405745257275088696311157297823662689037894645226208583;
    uint256 private constant R = 21888242871839275222246405745257275088548364400416034343698204186575808495617;
    uint256 private constant PROOF_BYTES = 256;
    /// @dev Words of alpha, beta, gamma and delta.
    uint256 private constant FIXED_WORDS = 14;
    uint256 private constant MAX_INPUTS = 256;
    address private constant ADD = address(6);
    address private constant MULTIPLY = address(7);
    address private constant PAIR = address(8);

    /// @notice keccak256 of the words of the verifying key.
    bytes32 public immutable program;
    /// @notice How many public inputs a proof has, each a word.
    uint256 public immutable inputCount;
    /// @dev A contract that has the words of the key as its code, after one byte that stops.
    address private immutable _key;

    error BadKey(uint256 words);

    /// @param key alpha (2 words), beta, gamma and delta (4 each, the imaginary part of a coordinate first), then a point (2) for the
    /// constant 1 and one for each public input.
    constructor(uint256[] memory key) {
        if (key.length < FIXED_WORDS + 4 || key.length > FIXED_WORDS + 2 + 2 * MAX_INPUTS || key.length % 2 != 0) {
            revert BadKey(key.length);
        }
        bytes memory words = abi.encodePacked(key);
        program = keccak256(words);
        inputCount = (key.length - FIXED_WORDS) / 2 - 1;
        // Copies what follows the first ten bytes and returns it as code.
        bytes memory creation = abi.encodePacked(hex"61", uint16(words.length + 1), hex"80600a3d393df300", words);
        address made;
        assembly ("memory-safe") {
            made := create(0, add(creation, 32), mload(creation))
        }
        if (made == address(0)) revert BadKey(key.length);
        _key = made;
    }

    /// @inheritdoc IVerifier
    /// @dev Whatever is not the one way to write a proof and inputs below the modulus is not proven.
    function verify(bytes32 programId, bytes calldata publicInputs, bytes calldata proof) external view returns (bool) {
        uint256 count = inputCount;
        if (programId != program || publicInputs.length != count * 32 || proof.length != PROOF_BYTES) return false;
        uint256[] memory key = _words(FIXED_WORDS + 2 + 2 * count);

        uint256 x = key[FIXED_WORDS];
        uint256 y = key[FIXED_WORDS + 1];
        for (uint256 i; i < count; ++i) {
            uint256 input = uint256(bytes32(publicInputs[32 * i:32 * i + 32]));
            if (input >= R) return false;
            uint256 term = FIXED_WORDS + 2 + 2 * i;
            bool done;
            uint256 termX;
            uint256 termY;
            (done, termX, termY) = _point(MULTIPLY, abi.encode(key[term], key[term + 1], input));
            if (!done) return false;
            (done, x, y) = _point(ADD, abi.encode(x, y, termX, termY));
            if (!done) return false;
        }

        uint256[8] memory points = abi.decode(proof, (uint256[8]));
        // Infinity, which is written as zeros, is none of a proof's points; no other point of either group has this part zero. A's second
        // coordinate is reduced below, so that it alone could be written in two ways: the precompile refuses the others above the modulus.
        if (points[1] == 0 || points[1] >= P || (points[4] | points[5]) == 0 || points[7] == 0) return false;
        // e(A, B) = e(alpha, beta) e(inputs, gamma) e(C, delta). The precompile refuses what is not in its group.
        (bool called, bytes memory answer) = PAIR.staticcall(
            bytes.concat(
                abi.encode(points[0], P - points[1], points[2], points[3], points[4], points[5]),
                abi.encode(key[0], key[1], key[2], key[3], key[4], key[5]),
                abi.encode(x, y, key[6], key[7], key[8], key[9]),
                abi.encode(points[6], points[7], key[10], key[11], key[12], key[13])
            )
        );
        return called && answer.length == 32 && abi.decode(answer, (uint256)) == 1;
    }

    function _words(uint256 count) private view returns (uint256[] memory words) {
        words = new uint256[](count);
        address key = _key;
        assembly ("memory-safe") {
            extcodecopy(key, add(words, 32), 1, mul(count, 32))
        }
    }

    function _point(address precompile, bytes memory arguments) private view returns (bool done, uint256 x, uint256 y) {
        bytes memory answer;
        (done, answer) = precompile.staticcall(arguments);
        done = done && answer.length == 64;
        if (done) (x, y) = abi.decode(answer, (uint256, uint256));
    }
}

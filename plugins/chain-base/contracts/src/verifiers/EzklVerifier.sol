// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {IVerifier} from "../interfaces/IVerifier.sol";

/// @notice What EZKL generates once for all circuits. `verifyProof` answers with 1, the digest of the key, and numbers that are of no
/// use here, in a form that is not quite the ABI's.
interface IReusableVerifier {
    function registerVka(bytes32[] calldata vka) external returns (bytes32 digest);
    function verifyProof(bytes calldata proof, uint256[] calldata instances, bytes32[] calldata vka) external;
}

/// @title Checks proofs of one EZKL circuit
/// @notice Anybody may register a key with the reusable verifier, for any circuit. This contract keeps the key of its own circuit in a
/// code that nothing can change, hands it over in each call, and compares the digest that was checked with the pinned one.
contract EzklVerifier is IVerifier {
    /// @dev The order of BN254's scalar field.
    uint256 private constant ORDER = 0x30644e72e131a029b85045b68181585d2833e84879b9709143e1f593f0000001;
    uint256 private constant LIMB_BITS = 21;

    IReusableVerifier public immutable reusable;
    bytes32 public immutable program;
    /// @notice The digest of the key.
    bytes32 public immutable digest;
    /// @notice The length of every proof. What follows it would not be looked at, so nothing may.
    uint256 public immutable proofBytes;
    /// @notice How many words the public inputs have.
    uint256 public immutable words;
    /// @notice In how many limbs of 21 bits the circuit has the subject; 0 where it has it whole.
    uint256 public immutable limbs;
    /// @dev Its code is a zero byte and the key.
    address private immutable _key;

    error NoCodeAt(address verifier);
    error WrongDigest(bytes32 digest);
    error KeyNotStored();

    /// @param key The words of the key, one after the other.
    /// @dev The address of the reusable verifier follows the arguments as one more word. That way the whole creation code can be made
    /// before the address is known.
    constructor(bytes32 program_, uint256 proofBytes_, uint256 words_, uint256 limbs_, bytes memory key) {
        address halo2;
        assembly ("memory-safe") {
            codecopy(0, sub(codesize(), 32), 32)
            halo2 := mload(0)
        }
        if (halo2.code.length == 0) revert NoCodeAt(halo2);
        reusable = IReusableVerifier(halo2);
        program = program_;
        proofBytes = proofBytes_;
        words = words_;
        limbs = limbs_;
        digest = keccak256(key);

        // Copies what follows its ten bytes, and returns it as the code.
        bytes memory code = abi.encodePacked(hex"61", uint16(key.length + 1), hex"80600a5f395ff3", hex"00", key);
        address stored;
        assembly ("memory-safe") {
            stored := create(0, add(code, 32), mload(code))
        }
        if (stored.code.length != key.length + 1) revert KeyNotStored();
        _key = stored;

        bytes32 registered = reusable.registerVka(_load(stored));
        if (registered != digest) revert WrongDigest(registered);
    }

    /// @inheritdoc IVerifier
    /// @param publicInputs The subject and then, in the circuit's order, the other public numbers.
    function verify(bytes32 programId, bytes calldata publicInputs, bytes calldata proof) external view returns (bool) {
        if (programId != program || publicInputs.length != 32 * words || proof.length != proofBytes) return false;
        uint256 subject = uint256(bytes32(publicInputs[:32]));
        if (subject >> 248 != 0) return false;
        uint256 rest = words - 1;
        uint256[] memory instances = new uint256[](rest + (limbs == 0 ? 1 : limbs));
        for (uint256 i = 0; i < rest; i++) {
            uint256 word = uint256(bytes32(publicInputs[32 * (i + 1):]));
            if (word >= ORDER) return false;
            instances[i] = word;
        }
        if (limbs == 0) instances[rest] = subject;
        for (uint256 i = 0; i < limbs; i++) {
            instances[rest + i] = (subject >> (LIMB_BITS * i)) & ((1 << LIMB_BITS) - 1);
        }
        bytes memory asked = abi.encodeCall(IReusableVerifier.verifyProof, (proof, instances, _load(_key)));
        address to = address(reusable);
        bytes32 expected = digest;
        bool holds;
        assembly ("memory-safe") {
            holds := staticcall(gas(), to, add(asked, 32), mload(asked), 0, 64)
            holds := and(holds, gt(returndatasize(), 63))
            holds := and(holds, and(eq(mload(0), 1), eq(mload(32), expected)))
        }
        return holds;
    }

    /// @dev The words of the key.
    function _load(address stored) private view returns (bytes32[] memory key) {
        uint256 length = stored.code.length - 1;
        key = new bytes32[](length / 32);
        assembly ("memory-safe") {
            extcodecopy(stored, add(key, 32), 1, length)
        }
    }
}

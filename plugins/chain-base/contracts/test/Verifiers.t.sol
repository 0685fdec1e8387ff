// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Base} from "./Base.sol";
import {JobLane} from "../src/JobLane.sol";
import {IVerifier} from "../src/interfaces/IVerifier.sol";
import {Groth16Verifier} from "../src/verifiers/Groth16Verifier.sol";
import {HeadVerifier} from "../src/verifiers/HeadVerifier.sol";

/// @dev The cheat codes about blocks.
interface Blocks {
    function roll(uint256 number) external;
    function setBlockhash(uint256 number, bytes32 hash) external;
    function store(address where, bytes32 slot, bytes32 value) external;
}

/// @dev Real keys and proofs, made by `cargo run -p prover-groth16 --example fixtures`. This contract is the escrow whose job is proven.
contract VerifiersTest is Base {
    Blocks private constant blocks = Blocks(address(uint160(uint256(keccak256("hevm cheat code")))));
    uint256 private constant P = 21888242871839275222246405745257275088696311157297823662689037894645226208583;
    uint256 private constant R = 21888242871839275222246405745257275088548364400416034343698204186575808495617;
    address private constant HISTORY = 0x0000F90827F1C53a10cb7A02335B175320002935;
    uint256 private constant JOB = 7;
    uint64 private constant TRACED_AT = 900;
    uint64 private constant TOKENS = 11;

    Groth16Verifier private receipt;
    Groth16Verifier private head;
    HeadVerifier private draws;
    bytes32 private program;
    bytes private inputs;
    bytes private proof;

    JobLane.Job private _job;
    bytes32 private subject;
    bytes32 private seed;
    bytes32 private headProgram;
    bytes32 private drawsProgram;
    bytes private openings;

    function setUp() public {
        string memory json = vm.readFile("test/fixtures/groth16.json");
        receipt = Groth16Verifier(create_("Groth16Verifier", vm.parseJsonBytes(json, ".commitment.key")));
        program = bytes32(vm.parseJsonBytes(json, ".commitment.program"));
        inputs = vm.parseJsonBytes(json, ".commitment.publicInputs");
        proof = vm.parseJsonBytes(json, ".commitment.proof");

        head = Groth16Verifier(create_("Groth16Verifier", vm.parseJsonBytes(json, ".head.key")));
        draws = HeadVerifier(create_("HeadVerifier", abi.encode(3, head)));
        headProgram = head.program();
        drawsProgram = bytes32(vm.parseJsonBytes(json, ".head.program"));
        subject = bytes32(vm.parseJsonBytes(json, ".head.subject"));
        seed = bytes32(vm.parseJsonBytes(json, ".head.seed"));
        openings = vm.parseJsonBytes(json, ".head.openings");
        _job.trace = bytes32(vm.parseJsonBytes(json, ".head.trace"));
        _job.tracedAt = TRACED_AT;
        _job.outTokens = TOKENS;
        blocks.roll(TRACED_AT + 10);
        blocks.setBlockhash(TRACED_AT + 1, seed);
    }

    function jobs(uint256 jobId) external view returns (JobLane.Job memory job) {
        if (jobId == JOB) job = _job;
    }

    function statementOf(uint256 jobId) external view returns (bytes32) {
        return jobId == JOB ? subject : keccak256("another") >> 8;
    }

    /// @dev Failing and answering false both mean "not proven". Bounded gas: a precompile that fails takes all it is given.
    function proven(IVerifier verifier, bytes32 id, bytes memory words, bytes memory data) private view returns (bool) {
        try verifier.verify{gas: 3_000_000}(id, words, data) returns (bool holds) {
            return holds;
        } catch {
            return false;
        }
    }

    function with(bytes memory data, uint256 word, uint256 value) private pure returns (bytes memory changed) {
        changed = bytes.concat(data);
        assembly ("memory-safe") {
            mstore(add(add(changed, 32), mul(word, 32)), value)
        }
    }

    function wordOf(bytes memory data, uint256 word) private pure returns (uint256 value) {
        assembly ("memory-safe") {
            value := mload(add(add(data, 32), mul(word, 32)))
        }
    }

    function test_aRealProofIsAcceptedUnderItsProgramAlone() public view {
        yes(receipt.program() == program && receipt.inputCount() == 2, "the program is that of the keys");
        yes(proven(receipt, program, inputs, proof), "a good proof");
        yes(!proven(receipt, headProgram, inputs, proof), "another program");
        yes(!proven(head, program, inputs, proof), "another verifier");
        yes(!proven(head, headProgram, inputs, proof), "another verifier, with its own program");
    }

    function test_anyChangedWordIsRefused() public view {
        for (uint256 i; i < 2; ++i) {
            uint256 word = wordOf(inputs, i);
            for (uint256 bit; bit < 256; bit += 5) {
                yes(!proven(receipt, program, with(inputs, i, word ^ (1 << bit)), proof), "a changed input");
            }
            yes(!proven(receipt, program, with(inputs, i, word + R), proof), "another way to write the same number");
            yes(!proven(receipt, program, with(inputs, i, 0), proof), "zero");
        }
        for (uint256 i; i < 8; ++i) {
            uint256 word = wordOf(proof, i);
            for (uint256 bit; bit < 256; bit += 5) {
                yes(!proven(receipt, program, inputs, with(proof, i, word ^ (1 << bit))), "a changed proof");
            }
            yes(!proven(receipt, program, inputs, with(proof, i, word + P)), "another way to write the same point");
            yes(!proven(receipt, program, inputs, with(proof, i, P - word)), "a negated coordinate");
            yes(!proven(receipt, program, inputs, with(proof, i, 0)), "zero");
        }
    }

    function test_nothingButTheRightLengthsIsRead() public view {
        yes(!proven(receipt, program, bytes.concat(inputs, bytes1(0)), proof), "a byte more of inputs");
        yes(!proven(receipt, program, bytes.concat(inputs, bytes32(0)), proof), "a word more of inputs");
        yes(!proven(receipt, program, abi.encode(wordOf(inputs, 0)), proof), "a word less of inputs");
        yes(!proven(receipt, program, inputs, bytes.concat(proof, bytes1(0))), "a byte more of proof");
        yes(!proven(receipt, program, "", ""), "nothing");
        yes(!proven(receipt, program, inputs, new bytes(256)), "points at infinity");
    }

    function testFuzz_noOtherProofIsAccepted(uint8 word, uint256 change, bool ofInputs) public view {
        if (change == 0) return;
        bytes memory data = ofInputs ? inputs : proof;
        uint256 place = word % (data.length / 32);
        data = with(data, place, wordOf(data, place) ^ change);
        yes(!proven(receipt, program, ofInputs ? data : inputs, ofInputs ? proof : data), "a proof that was changed");
    }

    function test_keysOfAnotherShapeAreNotDeployed() public {
        for (uint256 words = 0; words < 18; ++words) {
            vm.expectRevert(abi.encodeWithSelector(Groth16Verifier.BadKey.selector, words));
            new Groth16Verifier(new uint256[](words));
        }
        vm.expectRevert(abi.encodeWithSelector(Groth16Verifier.BadKey.selector, 19));
        new Groth16Verifier(new uint256[](19));
        vm.expectRevert(abi.encodeWithSelector(HeadVerifier.BadSamples.selector, 0, 8));
        new HeadVerifier(0, head);
        vm.expectRevert(abi.encodeWithSelector(HeadVerifier.BadSamples.selector, 9, 8));
        new HeadVerifier(9, head);
        vm.expectRevert(abi.encodeWithSelector(HeadVerifier.NoCodeAt.selector, address(1234)));
        new HeadVerifier(1, Groth16Verifier(address(1234)));
    }

    function words_() private view returns (bytes memory) {
        return abi.encode(subject, JOB);
    }

    function opened() private view returns (HeadVerifier.Opening[] memory) {
        return abi.decode(openings, (HeadVerifier.Opening[]));
    }

    function test_drawnPositionsOfAJobAreProven() public {
        yes(proven(draws, drawsProgram, words_(), openings), "good openings");
        yes(keccak256(abi.encode(opened())) == keccak256(openings), "written as Solidity writes them");
        yes(!proven(draws, program, words_(), openings), "another program");
        yes(!proven(draws, headProgram, words_(), openings), "the program of one position");
        yes(!proven(draws, drawsProgram, abi.encode(subject, JOB + 1), openings), "another job");
        yes(!proven(draws, drawsProgram, abi.encode(uint256(subject) ^ 1, JOB), openings), "another subject");
        yes(!proven(draws, drawsProgram, abi.encode(subject), openings), "no job");
        yes(!proven(draws, drawsProgram, bytes.concat(words_(), bytes32(0)), openings), "a word more");
        vm.prank(ANYONE);
        yes(!proven(draws, drawsProgram, words_(), openings), "a caller that is no escrow");
    }

    function test_aContractThatDrawsMoreOrFewerChecksAnotherProgram() public {
        yes(draws.program() == drawsProgram, "the program that proofs name is the contract's");
        for (uint256 samples = 1; samples <= 8; ++samples) {
            HeadVerifier other = new HeadVerifier(samples, head);
            yes((other.program() == drawsProgram) == (samples == 3), "the number of draws is part of the program");
            if (samples != 3) yes(!proven(other, drawsProgram, words_(), openings), "it promises nothing by that of three");
        }
    }

    function test_pointsAtInfinityAreNoProof() public view {
        uint256[4] memory from = [uint256(0), 2, 6, 8];
        for (uint256 i; i < 3; ++i) {
            bytes memory changed = proof;
            for (uint256 word = from[i]; word < from[i + 1]; ++word) {
                changed = with(changed, word, 0);
            }
            yes(!proven(receipt, program, inputs, changed), "one point at infinity");
        }
    }

    function test_aStatementOfAnotherJobIsNotProven() public {
        subject = bytes32(uint256(subject) ^ 1);
        yes(!proven(draws, drawsProgram, words_(), openings), "the same tokens for another subject");
    }

    function test_everyPartOfAnOpeningIsChecked() public view {
        for (uint256 i; i < 3; ++i) {
            HeadVerifier.Opening[] memory o = opened();
            o[i].position ^= 1;
            refused(o, "another position");
            o = opened();
            o[i].token += 1;
            refused(o, "another token");
            o = opened();
            o[i].state = bytes32(uint256(o[i].state) ^ 1);
            refused(o, "another state");
            o = opened();
            o[i].state = bytes32(uint256(o[i].state) + R);
            refused(o, "the same state, written otherwise");
            o = opened();
            o[i].path = new bytes32[](o[i].path.length + 1);
            refused(o, "another path");
            o = opened();
            o[i].path[0] = 0;
            refused(o, "a changed path");
            o = opened();
            o[i].proof = o[(i + 1) % 3].proof;
            if (o[i].position != o[(i + 1) % 3].position) refused(o, "the proof of another position");
            o = opened();
            o[i].proof = "";
            refused(o, "no proof");
        }
        HeadVerifier.Opening[] memory two = new HeadVerifier.Opening[](2);
        (two[0], two[1]) = (opened()[0], opened()[1]);
        refused(two, "fewer than are drawn");
        refused(new HeadVerifier.Opening[](0), "none");
        HeadVerifier.Opening[] memory all = opened();
        (all[0], all[1]) = (all[1], all[0]);
        if (all[0].position != all[1].position) refused(all, "in another order");
    }

    function refused(HeadVerifier.Opening[] memory o, string memory what) private view {
        yes(!proven(draws, drawsProgram, words_(), abi.encode(o)), what);
    }

    function testFuzz_noOtherOpeningsAreAccepted(uint256 place, uint8 change) public view {
        if (change == 0) return;
        bytes memory data = bytes.concat(openings);
        place %= data.length;
        data[place] = bytes1(uint8(data[place]) ^ change);
        yes(!proven(draws, drawsProgram, words_(), data), "openings that were changed");
    }

    function test_thereIsNoDrawWithoutABlockATraceOrATokens() public {
        blocks.roll(TRACED_AT + 1);
        yes(!proven(draws, drawsProgram, words_(), openings), "the block that draws is not there yet");
        blocks.roll(TRACED_AT + 2);
        blocks.setBlockhash(TRACED_AT + 1, seed);
        yes(proven(draws, drawsProgram, words_(), openings), "it is there");
        blocks.setBlockhash(TRACED_AT + 1, bytes32(uint256(seed) ^ 1));
        yes(!proven(draws, drawsProgram, words_(), openings), "another block draws other positions");
        blocks.setBlockhash(TRACED_AT + 1, seed);
        _job.outTokens = 0;
        yes(!proven(draws, drawsProgram, words_(), openings), "no tokens");
        _job.outTokens = TOKENS + 1;
        yes(!proven(draws, drawsProgram, words_(), openings), "a tree of another size");
        _job.outTokens = TOKENS;
        _job.trace = 0;
        yes(!proven(draws, drawsProgram, words_(), openings), "no trace");
    }

    function test_olderBlocksAreReadFromTheHistory() public {
        blocks.roll(TRACED_AT + 1 + 256);
        blocks.setBlockhash(TRACED_AT + 1, seed);
        yes(draws.blockHash(TRACED_AT + 1) == seed, "the last that the opcode knows");
        blocks.roll(TRACED_AT + 2 + 256);
        yes(draws.blockHash(TRACED_AT + 1) == 0, "too old, on a chain without a history");
        yes(!proven(draws, drawsProgram, words_(), openings), "a draw that nobody remembers");
        // The code that EIP-2935 gives.
        vm.etch(
            HISTORY,
            hex"3373fffffffffffffffffffffffffffffffffffffffe14604657602036036042575f35600143038111604257611fff81430311604257611fff9006545f5260205ff35b5f5ffd5b5f35611fff60014303065500"
        );
        blocks.store(HISTORY, bytes32(uint256(TRACED_AT + 1) % 8191), seed);
        yes(draws.blockHash(TRACED_AT + 1) == seed, "the history knows it");
        yes(proven(draws, drawsProgram, words_(), openings), "good openings, later");
        blocks.roll(TRACED_AT + 1 + 8192);
        yes(draws.blockHash(TRACED_AT + 1) == 0, "and forgets it");
    }

    function test_whatChecksCost() public view {
        (bytes memory words, bytes memory data, bytes memory many) = (inputs, proof, openings);
        uint256 before = gasleft();
        receipt.verify(program, words, data);
        uint256 one = before - gasleft();
        words = words_();
        before = gasleft();
        draws.verify(drawsProgram, words, many);
        uint256 three = before - gasleft();
        yes(one < 215_000, string.concat("a receipt costs ", str(one)));
        yes(three < 760_000, string.concat("three positions cost ", str(three)));
    }
}
